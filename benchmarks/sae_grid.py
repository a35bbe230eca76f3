"""The packed engine against SAELens on a grid: 24 TopK SAEs (6 k x 2 layers x 2 seeds) of one 70m-shaped LM.

    python benchmarks/sae_grid.py [--repeats 3] [--steps 2] [--threads 1] [--quick] [--out FILE]

Ours is measured whole: one LM pass through the deepest hook, the shuffle, and a step of all 24 SAEs in one `SAEBank`.
SAELens' grid would take hours, so its cost is composed, in every round, from parts measured in that round:

- fetch(layer): `next` of the `ActivationsStore` that its `LanguageModelSAETrainingRunner` makes (dataset row, LM pass
  stopped at the hook, mixing buffer), one LM pass of 4,096 tokens per step; fetch(both layers): the same of its
  `MultiSAETrainingRunner`;
- step(k): `SAETrainer.step`, which both runners call for every SAE and step;
- one after another: 2 seeds x sum over layers and k of (fetch(layer) + step(k));
- `MultiSAETrainingRunner`: fetch(both layers) + 2 seeds x 2 layers x sum over k of step(k);
- nested budgets 10, 50 and 100 (any unit): SAELens trains three SAEs, 160 steps of the first sum; ours takes 100, since
  with a constant learning rate the shorter runs are prefixes of the longest, bit for bit.

The composition is checked: the runner itself (`LanguageModelSAETrainingRunner.run`) is run for a few steps of one cell.
Evaluation and saving are in neither arm. CPU-seconds, paired; the steps of different k share one set of SAELens weights
(k is switched in between) to save memory, which changes no cost.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from benchmarks._paired import Arm, Paired, Worker, machine, markdown_table, paired, serve, timed, write_report
from benchmarks.evaluation import MODEL, save_random_lm
from benchmarks.sae_step import KEEP_MEMORY

LAYERS, KS, SEEDS, BUDGETS = (1, 3), (8, 16, 32, 64, 128, 256), (0, 1), (10, 50, 100)
D_IN, BATCH, CONTEXT, ROWS = 512, 4096, 256, 512
ALLOCATORS: dict[str, dict[str, str]] = {"as installed": {}, "allocator tuned": KEEP_MEMORY}
SERIAL, MULTI, NESTED = (
    "24 cells, one after another",
    "24 cells, MultiSAETrainingRunner",
    "24 cells x budgets 10, 50, 100, one after another",
)
TARGETS = {
    "as installed": {SERIAL: 16.0},
    "allocator tuned": {SERIAL: 12.0, MULTI: 9.0, NESTED: 18.0},
}
CHECK = (LAYERS[-1], 32)  # the cell that SAELens' own runner trains, to check the composition
PEER, OURS = "sae_lens", "ours"


def hook(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def hooked_transformer(folder: Path) -> Any:
    """The saved LM as TransformerLens' HookedTransformer, SAELens' default class, weights unprocessed."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_neox_weights
    from transformers import GPTNeoXForCausalLM

    hf = GPTNeoXForCausalLM.from_pretrained(folder / "lm", dtype=torch.float32)
    size = hf.config
    config = HookedTransformerConfig(
        d_model=size.hidden_size,
        d_head=size.hidden_size // size.num_attention_heads,
        n_heads=size.num_attention_heads,
        d_mlp=size.intermediate_size,
        n_layers=size.num_hidden_layers,
        n_ctx=size.max_position_embeddings,
        eps=size.layer_norm_eps,
        d_vocab=size.vocab_size,
        act_fn=size.hidden_act,
        use_attn_scale=True,
        parallel_attn_mlp=size.use_parallel_residual,
        positional_embedding_type="rotary",
        rotary_dim=size.hidden_size // size.num_attention_heads // 4,
        rotary_adjacent_pairs=False,
        normalization_type="LN",
        device="cpu",
    )
    model = HookedTransformer(config)
    model.load_and_process_state_dict(
        convert_neox_weights(hf, config), fold_ln=False, center_writing_weights=False, center_unembed=False
    )
    return model


class PeerGrid:
    """SAELens' parts of the grid on one model: stores from its runners, one trainer whose k is switched."""

    def __init__(self, folder: Path, sizes: argparse.Namespace) -> None:
        from datasets import Dataset
        from sae_lens.training.sae_trainer import SAETrainer

        self.sizes = sizes
        self.model = hooked_transformer(folder)
        self.dataset = Dataset.from_dict({"tokens": np.load(folder / "tokens.npy")})
        runners = {layer: self.runner(layer, KS[0], 10**9) for layer in LAYERS}
        self.stores: dict[Any, Any] = {layer: iter(runner.activations_store) for layer, runner in runners.items()}
        self.stores["both"] = self.multi_store()
        first = runners[LAYERS[0]]
        self.trainer = SAETrainer(first.cfg.to_sae_trainer_config(), first.sae, iter([]))
        for store in self.stores.values():  # the buffers fill; from now on one pass serves one batch
            next(store)
            next(store)

    def runner(self, layer: int, k: int, tokens: int) -> Any:
        """SAELens' runner of one cell; its defaults but for sizes, and nothing logged or saved."""
        from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig
        from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
        from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

        config = LanguageModelSAERunnerConfig(
            sae=TopKTrainingSAEConfig(d_in=D_IN, d_sae=self.sizes.d_sae, k=k),
            hook_name=hook(layer),
            training_tokens=tokens,
            logger=LoggingConfig(log_to_wandb=False),
            output_path=None,
            **self.shared(),
        )
        return LanguageModelSAETrainingRunner(config, override_dataset=self.dataset, override_model=self.model)

    def multi_store(self) -> Any:
        """The two-hook activation stream of SAELens' `MultiSAETrainingRunner`."""
        from sae_lens.config import LoggingConfig
        from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

        config = MultiSAETrainingRunnerConfig(
            saes={str(layer): TopKTrainingSAEConfig(d_in=D_IN, d_sae=64, k=8) for layer in LAYERS},
            hook_names={str(layer): hook(layer) for layer in LAYERS},
            training_tokens=10**9,
            logger=LoggingConfig(log_to_wandb=False),
            **self.shared(),
        )
        runner = MultiSAETrainingRunner(config, override_dataset=self.dataset, override_model=self.model)
        return runner.activations_store.get_multi_hook_data_loader()

    def shared(self) -> dict[str, Any]:
        return {
            "model_name": MODEL,
            "dataset_path": "random tokens",
            "context_size": CONTEXT,
            "store_batch_size_prompts": BATCH // CONTEXT,
            "train_batch_size_tokens": BATCH,
            "prepend_bos": False,
            "checkpoint_path": None,
        }

    def measure(self) -> dict[str, float]:
        """CPU-seconds of every part, once."""
        seconds, batches = {}, {}
        for name, store in self.stores.items():
            start = time.process_time()
            batches[name] = next(store)
            seconds[f"fetch {name}"] = time.process_time() - start
        for k in KS:
            self.trainer.sae.cfg.k = k
            self.trainer.sae.activation_fn = self.trainer.sae.get_activation_fn()
            start = time.process_time()
            self.trainer.step(batches[LAYERS[0]])
            seconds[f"step {k}"] = time.process_time() - start
        return seconds

    def run_cell(self) -> float:
        """CPU-seconds per step of the CHECK cell in SAELens' own runner: a longer run less a shorter one."""
        taken = []
        for steps in (2, 5):
            runner = self.runner(*CHECK, steps * BATCH)
            start = time.process_time()
            runner.run()
            taken.append(time.process_time() - start)
        return (taken[1] - taken[0]) / 3


def peer(folder: Path, which: str, sizes: argparse.Namespace) -> Callable[[], object]:
    """A worker's work: every call leaves CPU-seconds in `<which>.json`, of the parts or of the runner's own step."""
    grid = PeerGrid(folder, sizes)
    if which == "check":
        return lambda: (folder / "check.json").write_text(json.dumps(grid.run_cell()), encoding="utf-8")
    tokens = torch.from_numpy(np.load(folder / "tokens.npy")[:2]).long()
    _, cache = grid.model.run_with_cache(tokens, names_filter=[hook(layer) for layer in LAYERS], prepend_bos=False)
    torch.save({layer: cache[hook(layer)].detach() for layer in LAYERS}, folder / "peer_acts.pt")
    return lambda: (folder / f"{which}.json").write_text(json.dumps(grid.measure()), encoding="utf-8")


def ours(folder: Path, sizes: argparse.Namespace) -> tuple[Callable[[], None], dict[str, Any]]:
    """`--steps` steps of the whole grid: LM passes, the shuffle of a block, `SAEBank.step`; and facts to print."""
    from models.host.host_lm import load_host_lm
    from models.sae.trainer import SAEBank, SAEConfig, bank_bytes

    lm = load_host_lm(MODEL, lm_path=folder / "lm")
    tokens = torch.from_numpy(np.load(folder / "tokens.npy")).long()
    cells: dict[Hashable, tuple[int, SAEConfig]] = {
        (layer, k, seed): (layer, SAEConfig(d_in=D_IN, d_sae=sizes.d_sae, k=k, seed=seed))
        for layer in LAYERS
        for k in KS
        for seed in SEEDS
    }
    bank = SAEBank(cells, n_threads=sizes.threads)
    per_pass = BATCH // CONTEXT
    generator = torch.Generator().manual_seed(0)
    position = 0

    def work() -> None:
        nonlocal position
        place = torch.randperm(sizes.steps * BATCH, generator=generator)
        block = {layer: torch.empty(len(place), D_IN) for layer in LAYERS}
        for i in range(sizes.steps):
            rows = torch.arange(position, position + per_pass) % len(tokens)
            position += per_pass
            for layer, a_BTD in lm.activations(tokens[rows], LAYERS).items():
                block[layer][place[i * BATCH : (i + 1) * BATCH]] = a_BTD.flatten(0, 1)
        for i in range(sizes.steps):
            bank.step({layer: acts[i * BATCH : (i + 1) * BATCH] for layer, acts in block.items()})

    trainer = next(iter(bank.trainers.values()))
    facts = {
        "backend": trainer.backend,
        "bytes": bank_bytes([config for _, config in cells.values()], BATCH, backend=trainer.backend),
        "acts": lm.activations(tokens[:2], LAYERS),
    }
    return work, facts


def compose(parts: Mapping[str, float]) -> dict[str, float]:
    """CPU-seconds of SAELens for each case from its parts: a training step of the grid; NESTED: all its 160."""
    steps = sum(parts[f"step {k}"] for k in KS)
    fetches = sum(parts[f"fetch {layer}"] for layer in LAYERS)
    serial = len(SEEDS) * (len(KS) * fetches + len(LAYERS) * steps)
    return {
        SERIAL: serial,
        MULTI: parts["fetch both"] + len(SEEDS) * len(LAYERS) * steps,
        NESTED: sum(BUDGETS) * serial,
    }


def measure(folder: Path, sizes: argparse.Namespace) -> tuple[dict[str, list[dict[str, float]]], list[float], dict]:
    """Rounds of SAELens' parts by allocator, our CPU-seconds per step by round, and facts to print."""
    parts: dict[str, list[dict[str, float]]] = {which: [] for which in ALLOCATORS}
    argv = [__file__, "--workspace", str(folder)]
    argv += ["--d-sae", str(sizes.d_sae), "--threads", str(sizes.threads)]
    progress = functools.partial(print, file=sys.stderr, flush=True)
    with contextlib.ExitStack() as stack:
        arms: dict[str, Arm] = {}
        for which, env in ALLOCATORS.items():
            worker = stack.enter_context(Worker([*argv, "--serve", which], env))

            def arm(worker: Worker = worker, which: str = which) -> float:
                seconds = worker()
                parts[which].append(json.loads((folder / f"{which}.json").read_text(encoding="utf-8")))
                return seconds

            arms[which] = arm
        work, facts = ours(folder, sizes)
        arms[OURS] = timed(work)
        results = paired(arms, baseline=OURS, repeats=sizes.repeats, warmup=1, progress=progress)
    with Worker([*argv, "--serve", "check"], ALLOCATORS["allocator tuned"]) as worker:
        worker()
    facts["check"] = json.loads((folder / "check.json").read_text(encoding="utf-8"))
    peer_acts = torch.load(folder / "peer_acts.pt")
    facts["difference"] = max(
        float((facts["acts"][layer] - peer_acts[layer]).norm() / peer_acts[layer].norm()) for layer in LAYERS
    )
    rounds = {which: taken[1:] for which, taken in parts.items()}  # the first was the warm-up
    return rounds, [seconds / sizes.steps for seconds in results[OURS].arm_s], facts


def report(sizes: argparse.Namespace, *, full_size: bool) -> tuple[str, bool]:
    """Measure everything; Markdown, and whether every target was met."""
    from importlib.metadata import version

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        save_random_lm(folder / "lm")
        np.save(folder / "tokens.npy", np.random.default_rng(1).integers(0, 50304, (ROWS, CONTEXT), dtype=np.int32))
        rounds, our_s, facts = measure(folder, sizes)
    lines = [
        "# sae_grid",
        "",
        f"{len(LAYERS) * len(KS) * len(SEEDS)} TopK SAEs (k {', '.join(map(str, KS))}; layers 1 and 3; 2 seeds), d_in "
        f"{D_IN}, d_sae {sizes.d_sae}, batch {BATCH}, context {CONTEXT}, of a 70m-shaped GPT-NeoX with random "
        f"weights on random tokens; {sizes.threads} thread{'s' if sizes.threads > 1 else ''}, {sizes.repeats} rounds. "
        f"Peer: sae_lens {version('sae-lens')}, TransformerLens' HookedTransformer. Machine: {machine()}.",
        "",
        "Re-run: `python benchmarks/sae_grid.py --out docs/benchmarks/sae_grid.md`.",
        "",
        "**How to read it.** Our cost is measured whole. SAELens' cost is composed, round by round, from the measured "
        "parts of the last table: one after another = 2 x [6 x (fetch layer 1 + fetch layer 3) + 2 x sum of step(k)]; "
        "MultiSAETrainingRunner = fetch both + 4 x sum of step(k); budgets: 160 steps of the first against 100 of ours "
        "(constant learning rate). CPU-seconds are those of one training step of all 24 SAEs; for the budgets, of all "
        "steps. Neither includes evaluation and saving.",
    ]
    composed = {which: [compose(parts) for parts in taken] for which, taken in rounds.items()}
    met = True
    for which, taken in composed.items():
        cases = {}
        for case in (SERIAL, MULTI, NESTED):
            base = tuple(costs[case] for costs in taken)
            arm = tuple(seconds * (max(BUDGETS) if case == NESTED else 1) for seconds in our_s)
            cases[case] = {
                PEER: Paired(name=PEER, baseline_s=base, arm_s=base),
                OURS: Paired(name=OURS, baseline_s=base, arm_s=arm),
            }
        targets = {(case, OURS): least for case, least in TARGETS[which].items() if full_size}
        met &= all(cases[case][OURS].ratio >= least for (case, _), least in targets.items())
        lines += ["", f"## SAELens {which}", "", markdown_table(cases, baseline=PEER, targets=targets)]
    names = list(next(iter(rounds.values()))[0])
    lines += ["", "## Measured parts of SAELens, CPU-seconds (median)", ""]
    lines += ["| part | " + " | ".join(rounds) + " |", "|---" * (len(rounds) + 1) + "|"]
    medians = {which: {n: float(np.median([p[n] for p in taken])) for n in names} for which, taken in rounds.items()}
    lines += [f"| {part} | " + " | ".join(f"{medians[which][part]:.3f}" for which in rounds) + " |" for part in names]
    layer, k = CHECK
    expected = medians["allocator tuned"][f"fetch {layer}"] + medians["allocator tuned"][f"step {k}"]
    lines += [
        "",
        f"- Check of the composition: `LanguageModelSAETrainingRunner.run` itself, layer {layer}, k = {k}, allocator "
        f"tuned: {facts['check']:.2f} CPU-seconds per step (5-step run less 2-step run); from the parts "
        f"{expected:.2f}.",
        f"- Both language models give the same activations: relative difference {facts['difference']:.1e}.",
        f"- Ours: backend {facts['backend']}, {facts['bytes'] / 2**30:.1f} GiB for the 24 SAEs with their Adam state "
        "and the shared scratch (`bank_bytes`).",
    ]
    return "\n".join(lines), met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="our training steps a round")
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small, one round, to see that it runs; no targets")
    parser.add_argument("--out")
    parser.add_argument("--serve", choices=[*ALLOCATORS, "check"], help=argparse.SUPPRESS)
    parser.add_argument("--workspace", type=Path, help=argparse.SUPPRESS)
    sizes = parser.parse_args()
    torch.set_num_threads(sizes.threads)
    if sizes.serve:
        serve(peer(sizes.workspace, sizes.serve, sizes))
        return 0
    if sizes.quick:
        sizes.repeats, sizes.steps, sizes.d_sae = 1, 1, 1024
    text, met = report(sizes, full_size=sizes.d_sae == 16384)
    write_report(text, sizes.out)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
