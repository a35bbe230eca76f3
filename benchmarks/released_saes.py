"""Auditing released SAEs: one JumpReLU SAE and ten of one hook, against SAELens' `run_evals` one after another.

A 70m-shaped Pythia with random weights, layer 3, d_sae 16384, the same sequences. The peer computes CE with and without
the SAE and ablated, norms, sparsity, variance and density through TransformerLens' TransformerBridge on the same
Hugging Face model. Ours is the audit's own evaluation with `rungs=free`: the same numbers and those that the shared
pass gives with them (gradients, SWD, geometry of every layer), one pass of the model for all SAEs. CPU-seconds, paired,
both arms as installed, in one process.

    python benchmarks/released_saes.py [--sequences 4] [--repeats 3] [--threads 1] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks._paired import Arm, machine, markdown_table, paired, timed, write_report
from benchmarks.evaluation import CONTEXT, MODEL, only_evaluated, saelens_losses, save_random_lm

LAYER, FIRING, TARGETS = 3, 32, {1: 3.0, 10: 5.0}


def make_workspace(folder: Path, d_sae: int, tokens_ST: torch.Tensor) -> None:
    """The model, a tokenizer, and ten JumpReLU SAEs that SAELens saved, of which FIRING features fire per token."""
    from sae_lens import saes
    from sae_lens.saes.sae import SAEMetadata
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from models.host.host_lm import load_host_lm

    torch.manual_seed(0)
    save_random_lm(folder / "lm", head_scale=5.0)
    special = {f"{role}_token": "<e>" for role in ("bos", "eos", "unk", "pad")}
    words = Tokenizer(models.WordLevel({"<e>": 0}, unk_token="<e>"))
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "tokenizer")
    acts_TD = load_host_lm(MODEL, lm_path=folder / "lm").activations(tokens_ST, [LAYER])[LAYER].flatten(0, 1)
    about = SAEMetadata(model_name=MODEL, hook_name=f"blocks.{LAYER}.hook_resid_post", context_size=CONTEXT)
    for number in range(max(TARGETS)):
        sae = saes.JumpReLUSAE(saes.JumpReLUSAEConfig(d_in=512, d_sae=d_sae, metadata=about))
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True)
            sae.W_enc.copy_(sae.W_dec.T)
            highest = (acts_TD @ sae.W_enc).flatten().topk(FIRING * len(acts_TD) + 500).values[-1000:]
            gap = int((highest[:-1] - highest[1:]).argmax())
            sae.threshold.fill_(float(highest[gap : gap + 2].mean()))  # far from any score: rounding decides nothing
        sae.save_model(folder / f"sae{number}")


def peer(folder: Path, count: int, tokens_ST: torch.Tensor, found: dict[str, list[float]]) -> Any:
    """`run_evals` of each SAE."""
    from sae_lens import SAE

    saes = [SAE.load_from_disk(folder / f"sae{number}") for number in range(count)]
    losses = saelens_losses(folder, tokens_ST)

    def work() -> None:
        found["peer"] = [losses(sae)["ce_loss_with_sae"] for sae in saes]

    return work


def ours(folder: Path, count: int, tokens_ST: torch.Tensor, found: dict[str, list[float]]) -> Any:
    """The audit's evaluation of each SAE, on one pass of the model."""
    from models.host.host_lm import load_host_lm
    from models.sae.folders import read_folder
    from sweeps.sae.evaluate import Evaluation
    from sweeps.sae.presets import PRESETS
    from sweeps.sae.released import plan_released

    lm = load_host_lm(MODEL, lm_path=folder / "lm")
    folders = tuple(str(folder / f"sae{number}") for number in range(count))
    cells = plan_released(
        replace(PRESETS["released"], saes=folders, eval_sequences=len(tokens_ST), stream="pile", rungs="free")
    )
    saes = [read_folder(name) for name in folders]
    tokens = tokens_ST.numpy()
    stream = only_evaluated(tokens)
    context: Any = SimpleNamespace(progress=lambda **_: None, device="cpu")

    def work() -> None:
        evaluation = Evaluation(lm, stream, [LAYER], cells[0], context)
        rows = [evaluation.run(cell, sae)[0] for cell, sae in zip(cells, saes, strict=True)]
        found["ours"] = [next(r.value for r in part if r.metric == "loss_recon") for part in rows]

    return work


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small SAEs, one round, to see that it runs; no targets")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.sequences, options.repeats = 2, 1
    tokens_ST = torch.from_numpy(np.random.default_rng(1).integers(0, 50304, (options.sequences, CONTEXT)))
    cases, lines = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_workspace(folder, 1024 if options.quick else 16384, tokens_ST)
        for count in TARGETS:
            found: dict[str, list[float]] = {}
            arms: dict[str, Arm] = {
                "sae_lens": timed(peer(folder, count, tokens_ST, found)),
                "ours": timed(ours(folder, count, tokens_ST, found)),
            }
            say = functools.partial(print, file=sys.stderr, flush=True)
            cases[f"{count} SAE{'s' * (count > 1)}"] = paired(
                arms, baseline="sae_lens", repeats=options.repeats, warmup=1, progress=say
            )
            worst = max(abs(a - b) for a, b in zip(found["ours"], found["peer"], strict=True))
            lines.append(f"- {count}: largest difference of a CE from the peer's {worst:.1e} nats (allowed 1e-5)")
    targets = {(case, "ours"): t for case, t in zip(cases, TARGETS.values(), strict=True) if not options.quick}
    table = markdown_table(cases, baseline="sae_lens", targets=targets)
    head = ["# released_saes", "", machine(), "", "Re-run: `python benchmarks/released_saes.py`.", ""]
    write_report("\n".join([*head, table, "", *lines]), options.out)
    return 0 if all(cases[case]["ours"].ratio >= target for (case, _), target in targets.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
