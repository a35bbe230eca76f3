"""Evaluating 12 SAEs of one language model: ours (CE, R² and friends, SWD, bootstrap) against SAELens' `run_evals`.

A 70m-shaped Pythia with random weights, two hooks, six k per hook, d_sae 16384, all on the same sequences. The peer
computes CE with and without the SAE and ablated, norms, sparsity, variance and density, one SAE after another,
through TransformerLens' TransformerBridge on the same Hugging Face model. Ours is the sweep's own evaluation, with
its gradients, SWD and 5,000 bootstrap resamples, and without writing the SAEs to disk. CPU-seconds, paired.

    python benchmarks/evaluation.py [--sequences 4] [--repeats 3] [--threads 1] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from benchmarks._paired import Arm, Worker, machine, markdown_table, paired, serve, timed, write_report

MODEL, LAYERS, KS = "pythia-70m", (1, 3), (8, 16, 32, 64, 128, 256)
D_SAE, CONTEXT = 16384, 256
CELLS = [(layer, k) for layer in LAYERS for k in KS]
# glibc keeps the peer's 200 MB temporaries instead of returning their pages after each use
TUNED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_TOP_PAD_": "0"}
DTYPES = {"float32": "float32", "bfloat16 logits": "bfloat16"}
TARGETS = {"float32": 3.5, "bfloat16 logits": 5.0}
TOLERANCES = {"float32": 1e-5, "bfloat16 logits": 2e-4}


def save_random_lm(folder: Path, head_scale: float = 1.0) -> None:
    """A 70m-shaped GPT-NeoX with random weights in Hugging Face format (`torch.manual_seed` decides which)."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=50304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048
    )
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= head_scale
    model.save_pretrained(folder)


def only_evaluated(tokens_ST: np.ndarray) -> Any:
    """A stream as far as an evaluation looks at it: sequences of no known documents."""
    return SimpleNamespace(
        eval_sequences=lambda n: tokens_ST[:n],
        held_out_documents=lambda n: None,
        held_out_place=str,
        source="benchmark",
    )


def make_workspace(folder: Path, sequences: int, d_sae: int) -> None:
    """The model, the SAEs and the tokens that every arm loads."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from models.host.host_lm import load_host_lm
    from models.sae.model import SAEConfig, TopKSAE
    from models.sae.saelens import save_saelens

    torch.manual_seed(0)
    save_random_lm(folder / "lm", head_scale=5.0)  # logits of a few nats: rounding them must show
    special = {f"{role}_token": "<e>" for role in ("bos", "eos", "unk", "pad")}
    words = Tokenizer(models.WordLevel({"<e>": 0}, unk_token="<e>"))
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "tokenizer")
    tokens = np.random.default_rng(1).integers(0, 50304, (sequences, CONTEXT), dtype=np.int32)
    np.save(folder / "tokens.npy", tokens)
    lm = load_host_lm(MODEL, lm_path=folder / "lm")
    acts = lm.activations(torch.from_numpy(tokens[:1]).long(), LAYERS)
    for layer, k in CELLS:
        sae = TopKSAE.from_config(SAEConfig(d_in=512, d_sae=d_sae, k=k, seed=k))
        with torch.no_grad():
            sae.b_dec.copy_(acts[layer].mean((0, 1)))
        save_saelens(sae, folder / cell_name(layer, k), {"hook_name": lm.hook_name(layer), "model_name": MODEL})


def cell_name(layer: int, k: int) -> str:
    return f"layer{layer}-k{k}"


class FixedTokens:
    """The part of SAELens' activation store that `run_evals` uses, serving the same tokens again and again."""

    context_size = CONTEXT

    def __init__(self, tokens_ST: torch.Tensor) -> None:
        self.tokens_ST = tokens_ST
        self.store_batch_size_prompts = len(tokens_ST)

    def get_batch_tokens(self, batch_size: int) -> torch.Tensor:
        return self.tokens_ST[:batch_size]

    def reset_input_dataset(self) -> None:
        """Nothing to rewind: every batch is the same."""


def saelens_losses(folder: Path, tokens_ST: torch.Tensor) -> Callable[[Any], dict[str, float]]:
    """What gives an SAE's losses by SAELens' `run_evals` on the folder's model, every token counted as ours counts it.

    It computes norms, sparsity, variance and density with them, in one batch of all the sequences.
    """
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

    hf = GPTNeoXForCausalLM.from_pretrained(folder / "lm", dtype=torch.float32).eval()
    model: Any = TransformerBridge.boot_transformers(
        f"EleutherAI/{MODEL}",
        hf_model=hf,
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
    )
    store: Any = FixedTokens(tokens_ST)
    config = EvalConfig(
        batch_size_prompts=len(store.tokens_ST),
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )

    def losses(sae: Any) -> dict[str, float]:
        metrics, _ = run_evals(sae, store, model, ActivationScaler(), config, exclude_special_tokens=False)
        return metrics["model_performance_preservation"]

    return losses


def peer(folder: Path) -> Any:
    """`run_evals` of every SAE, one after another; leaves its CEs in peer.json."""
    from sae_lens import SAE

    saes = {cell: SAE.load_from_disk(str(folder / cell_name(*cell))) for cell in CELLS}
    losses = saelens_losses(folder, torch.from_numpy(np.load(folder / "tokens.npy")).long())

    def work() -> None:
        found = {}
        for cell, sae in saes.items():
            names = ("ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation")
            own = losses(sae)
            found[cell_name(*cell)] = [own[name] for name in names]
        (folder / "peer.json").write_text(json.dumps(found), encoding="utf-8")

    return work


def ours(folder: Path, dtype: str) -> Any:
    """The sweep's evaluation of every SAE; leaves its CEs in ours-<dtype>.json."""
    from models.host.host_lm import load_host_lm
    from models.sae.saelens import load_saelens
    from models.sae.trainer import encoder
    from sweeps.sae.cells import SAECell
    from sweeps.sae.evaluate import Evaluation

    tokens = np.load(folder / "tokens.npy")
    lm = load_host_lm(MODEL, lm_path=folder / "lm")
    stream = only_evaluated(tokens)
    context: Any = SimpleNamespace(progress=lambda **_: None, device="cpu")
    saes = {cell: load_saelens(folder / cell_name(*cell))[0] for cell in CELLS}
    cells = {
        (layer, k): SAECell(
            model=MODEL,
            layer=layer,
            depth=str(layer),
            k=k,
            seed=0,
            tokens=4096,
            stream="pile",
            context=CONTEXT,
            d_sae=saes[layer, k].W_enc.shape[0],
            batch_tokens=4096,
            shuffle_sequences=16,
            lr=3e-4,
            schedule="constant",
            warmup_steps=0,
            decay_steps=0,
            aux_coefficient=1.0,
            dead_after_steps=1000,
            eval_sequences=len(tokens),
            lm_dtype=dtype,
            rungs="free",  # the peer measures nothing like the others: benchmarks/rungs.py has their cost
        )
        for layer, k in CELLS
    }

    encoder(next(iter(saes.values())))(torch.zeros(1, 512))  # compiles or loads the kernels

    def work() -> None:
        found = {}
        evaluation = Evaluation(lm, stream, LAYERS, cells[CELLS[0]], context)
        for at, cell in cells.items():
            rows, _, _ = evaluation.run(cell, saes[at])
            value = {row.metric: row.value for row in rows}
            found[cell_name(*at)] = [value[name] for name in ("loss_orig", "loss_recon", "loss_zero")]
        (folder / f"ours-{dtype}.json").write_text(json.dumps(found), encoding="utf-8")

    return work


def worst_difference(folder: Path, dtype: str) -> float:
    """Largest relative difference of any CE (with, without, ablated) of any cell from the peer's."""
    expected = json.loads((folder / "peer.json").read_text(encoding="utf-8"))
    found = json.loads((folder / f"ours-{dtype}.json").read_text(encoding="utf-8"))
    return max(abs(a - b) / b for cell in expected for a, b in zip(found[cell], expected[cell], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small SAEs, one round, to see that it runs; no targets")
    parser.add_argument("--out")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.serve:
        serve(peer(options.serve))
        return 0
    d_sae = 1024 if options.quick else D_SAE
    if options.quick:
        options.sequences, options.repeats = 2, 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_workspace(folder, options.sequences, d_sae)
        argv = [__file__, "--serve", name, "--threads", str(options.threads)]
        with Worker(argv) as installed, Worker(argv, TUNED_MALLOC) as tuned:
            arms: dict[str, Arm] = {
                "sae_lens, allocator tuned": tuned,
                "sae_lens, as installed": installed,
                **{arm: timed(ours(folder, dtype)) for arm, dtype in DTYPES.items()},
            }
            baseline = next(iter(arms))
            progress = functools.partial(print, file=sys.stderr, flush=True)
            results = paired(arms, baseline=baseline, repeats=options.repeats, warmup=0, progress=progress)
        worst = {arm: worst_difference(folder, dtype) for arm, dtype in DTYPES.items()}
    agreement = [
        f"- {arm}: largest relative difference of a CE from the peer's {worst[arm]:.1e} (allowed {allowed:g})"
        for arm, allowed in TOLERANCES.items()
    ]
    case = f"{len(CELLS)} cells, {options.sequences} x {CONTEXT} tokens"
    targets = {} if options.quick else {(case, arm): target for arm, target in TARGETS.items()}
    table = markdown_table({case: results}, baseline=baseline, targets=targets)
    text = [
        "# evaluation",
        "",
        f"{machine()}",
        "",
        "Re-run: `python benchmarks/evaluation.py --out docs/benchmarks/evaluation.md`.",
        "",
        table,
        "",
        *agreement,
    ]
    write_report("\n".join(text), options.out)
    met = all(results[arm].ratio >= target for (_, arm), target in targets.items())
    agree = all(worst[arm] <= allowed for arm, allowed in TOLERANCES.items())
    return 0 if met and agree else 1


if __name__ == "__main__":
    sys.exit(main())
