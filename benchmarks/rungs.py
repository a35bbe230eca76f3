"""What each rung of the ladder of proxies costs, in patched passes of the same language model; CPU-seconds, paired.

One SAE's error at one layer: the patched pass (CE_rec), the same with KL, the forward-mode pass with the Fisher forms,
the patched pass with the attention plans' distances, and what all SAEs share (the backward pass, and that with drawn
labels). A cost is a ratio to the patched pass of the same round; small is good.

    python benchmarks/rungs.py [--model smollm2-135m] [--layer 15] [--sequences 8] [--repeats 5] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks._paired import Arm, Paired, machine, paired, timed, write_report
from models.host.attention_plans import AttentionPlans
from models.host.host_lm import HostLM, load_host_lm
from models.host.predictions import Predictions, jvp

CONTEXT = 256
MOST = {"patched pass with KL": 1.05, "Fisher forms": 3.0, "patched pass with attention plans": 1.5}
BASE = "patched pass"


def arms(lm: HostLM, layer: int, sequences: int) -> dict[str, Arm]:
    """Work on random tokens and an error of 2% of each activation's norm."""
    g = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, lm.d_vocab, (sequences, CONTEXT), generator=g)
    found = lm.unpatched(tokens_BT, [layer])
    a_BTD, tail = found.activations[layer], lm.tail(layer, tokens_BT)
    noise_BTD = torch.nn.functional.normalize(torch.randn(a_BTD.shape, generator=g), dim=-1)
    delta_BTD = 0.02 * a_BTD.norm(dim=-1, keepdim=True) * noise_BTD
    known = Predictions(lm.head, tokens_BT, found.hidden_BTD, found.pull_BTD, found.loss_B)
    plans = AttentionPlans(lm.model.config._attn_implementation)  # type: ignore[union-attr, arg-type]

    def patched(kl: bool = False) -> None:
        with torch.no_grad():
            hidden_BTD = tail(a_BTD + delta_BTD)
            loss_B = lm.mean_loss(hidden_BTD, tokens_BT)
            if kl:
                known.kl(hidden_BTD, loss_B)

    def fisher() -> None:
        with plans.reference():
            _, tangent_BTD = jvp(tail, a_BTD, delta_BTD)
        known.fisher(tangent_BTD, torch.float32)

    def with_plans() -> None:
        with plans.distances():
            patched(kl=True)

    fisher()  # the attention plans' reference
    return {
        BASE: timed(patched),
        "patched pass with KL": timed(lambda: patched(kl=True)),
        "Fisher forms": timed(fisher),
        "patched pass with attention plans": timed(with_plans),
        "forward and backward, shared": timed(lambda: lm.unpatched(tokens_BT, [layer])),
        "forward and both backwards, shared": timed(lambda: lm.unpatched(tokens_BT, [layer], draws=g)),
    }


def table(found: dict[str, Paired]) -> tuple[str, bool]:
    """Costs in patched passes, median [min, max] over rounds, and whether every limit is kept."""
    lines = ["| rung | CPU-seconds | cost in patched passes | at most | met |", "|---|---|---|---|---|"]
    kept = True
    for name, arm in found.items():
        costs = sorted(1 / r for r in arm.ratios)
        limit = MOST.get(name)
        met = limit is None or 1 / arm.ratio <= limit
        kept &= met
        said = "" if limit is None else ("yes" if met else "**no**")
        spread = f"{1 / arm.ratio:.3f} [{costs[0]:.3f}, {costs[-1]:.3f}]"
        lines.append(f"| {name} | {arm.seconds:.3f} | {spread} | {'' if limit is None else f'{limit:g}'} | {said} |")
    return "\n".join(lines), kept


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one sequence, one round, to see that it runs")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.quick:
        options.sequences, options.repeats = 1, 1
    torch.set_num_threads(1)
    lm = load_host_lm(options.model)
    found = paired(
        arms(lm, options.layer, options.sequences),
        baseline=BASE,
        repeats=options.repeats,
        progress=lambda line: print(line, file=sys.stderr),
    )
    text, kept = table(found)
    head = f"# Rungs of the ladder: {options.model}, layer {options.layer}, {options.sequences} x {CONTEXT} tokens"
    write_report(f"{head}\n\n{text}\n\n{machine()}", options.out)
    return 0 if kept or options.quick else 1


if __name__ == "__main__":
    raise SystemExit(main())
