"""Task-relevant dimension by mutual information on pairs whose truth is known, and what one layer takes.

Gaussian pairs of rank 1 to 8 (correlation 0.8, among noise, each view rotated): the information −½ Σ log(1 − ρ²), what
InfoNCE with the true density ratio gives for batches of 128, and the estimates with a hybrid and a separable critic.
An angle and the same angle turned: one dimension that a separable critic needs two for. Independent pairs. Then
CPU-seconds of a step of all critics of one fold at a real layer's size, times the most steps that a layer may take.

    python benchmarks/information.py [--ranks 1,2,3] [--tokens 50000] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from analysis.markdown import table
from analysis.sae.task_dimension import task_dimension
from benchmarks._paired import machine
from models.host.logit_directions import MOST
from models.information.critics import CriticBank, info_nce
from models.information.estimate import Information, measure
from models.information.settings import CriticSettings
from models.information.training import Pairs, train

RHO, LENGTH, NOISE = 0.8, 20, 6  # correlation, tokens of a sequence, dimensions of noise
SMALL = CriticSettings(hidden=64, lr=2e-3, folds=3, starts=2, steps=800, every=50, patience=8, test_batches=16)
MOST_SECONDS = 360.0  # of one layer of 50,000 tokens: 3 minutes on 2 cores
HEAD = ["pairs", "truth, nats", "best critic", "critic", "estimate", "k_MI* [95%]", "one-shot", "CPU-s"]


def gaussian(rank: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two views of `rank` correlated pairs among NOISE dimensions of noise, each rotated."""
    g = torch.Generator().manual_seed(100 * rank + seed)
    shared, own = torch.randn(2, tokens, rank, generator=g)
    views = []
    for z_TR in (shared, RHO * shared + math.sqrt(1 - RHO**2) * own):
        whole_TD = torch.cat([z_TR, torch.randn(tokens, NOISE, generator=g)], dim=1)
        turn_DD = torch.linalg.qr(torch.randn(rank + NOISE, rank + NOISE, generator=g))[0]
        views.append((whole_TD @ turn_DD).unflatten(0, (-1, LENGTH)))
    return views[0], views[1]


def best_bound(rank: int) -> float:
    """InfoNCE of the true density ratio."""
    g = torch.Generator().manual_seed(0)
    x_MNR, own_MNR = torch.randn(2, 200, SMALL.batch, rank, generator=g)
    y_MNR = RHO * x_MNR + math.sqrt(1 - RHO**2) * own_MNR
    squares_MNN = RHO**2 * (x_MNR.square().sum(2)[:, :, None] + y_MNR.square().sum(2)[:, None])
    return float(info_nce((2 * RHO * x_MNR @ y_MNR.transpose(1, 2) - squares_MNN) / (2 * (1 - RHO**2))).mean())


def angles(tokens: int, part: float, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Points on a part of a circle, and the same turned, with Gaussian noise in the angle."""
    g = torch.Generator().manual_seed(0)
    x_T = part * 2 * math.pi * torch.rand(tokens, generator=g)
    y_T = x_T + 0.7 + noise * torch.randn(tokens, generator=g)
    first, second = (torch.stack([a.cos(), a.sin()], dim=1).unflatten(0, (-1, LENGTH)) for a in (x_T, y_T))
    return first, second


def row(name: str, views: tuple[Tensor, Tensor], settings: CriticSettings, truth: str, best: str) -> list[str]:
    """One measurement as a line of the table."""
    began = time.process_time()
    found = measure(*views, settings)
    line = [name, truth, best, settings.critic, f"{found.estimate_FK.mean(axis=0).max():.3f}", _dimension(found)]
    line += [f"{found.ratio_F.mean():.1f}", f"{time.process_time() - began:.0f}"]
    print(" | ".join(line), flush=True)
    return line


def _dimension(found: Information) -> str:
    of = task_dimension(found.dimensions, found.estimate_FK)
    return f"– ({of.needs})" if of.needs else f"{of.k:.0f} [{of.lo:.0f}, {of.hi:.0f}]"


def step_seconds(width: int, tokens: int, steps: int) -> tuple[float, float]:
    """(CPU-seconds of a training step of one fold's critics with its share of test estimates, of a whole layer)."""
    g = torch.Generator().manual_seed(0)
    of = CriticSettings()
    few = replace(of, steps=steps, every=min(of.every, steps), smooth=1)
    pairs = Pairs(torch.randn(tokens, width, generator=g), torch.randn(tokens, min(width, MOST), generator=g))
    members = [(k, start) for k in of.dimensions for start in range(of.starts)]
    cut, rows = tokens // of.folds, torch.arange(tokens)
    train(CriticBank(few, members, pairs.widths, 0), pairs, rows[cut:], rows[:cut], 0)  # compiles the kernels
    bank, began = CriticBank(few, members, pairs.widths, 0), time.process_time()
    train(bank, pairs, rows[cut:], rows[:cut], 0)
    step = (time.process_time() - began) / steps
    return step, step * of.steps * of.folds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,3,4,5,6,7,8")
    parser.add_argument("--tokens", type=int, default=50_000, help="of the layer whose cost is measured")
    parser.add_argument("--width", type=int, default=576, help="of that layer")
    parser.add_argument("--quick", action="store_true", help="rank 1 alone, few steps")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    small = replace(SMALL, folds=2, steps=200) if asked.quick else SMALL
    lines = []
    for rank in [1] if asked.quick else [int(r) for r in asked.ranks.split(",")]:
        truth, best = f"{-0.5 * rank * math.log(1 - RHO**2):.3f}", f"{best_bound(rank):.3f}"
        widths = tuple(k for k in (rank - 1, rank, rank + 1, rank + 3) if k)
        for critic in ("hybrid", "separable"):
            settings = replace(small, dimensions=widths, critic=critic)
            lines.append(row(f"Gaussian, rank {rank}", gaussian(rank, 20_000), settings, truth, best))
    parts = [] if asked.quick else [(0.75, "angle on 3/4 of a circle"), (1.0, "angle on a whole circle")]
    for part, name in parts:
        for critic in ("hybrid", "separable"):
            settings = replace(small, dimensions=(1, 2), critic=critic)
            lines.append(row(name, angles(10_000, part), settings, "", ""))
    independent = gaussian(1, 10_000)[0], gaussian(2, 10_000, seed=1)[1]
    lines.append(row("independent", independent, replace(small, dimensions=(1, 2)), "0", "0"))
    step, layer = step_seconds(asked.width, asked.tokens, 10 if asked.quick else 100)
    cost = (
        f"Width {asked.width}, {asked.tokens} tokens: {step * 1e3:.0f} CPU-ms a step of one fold's critics, at most "
        f"{layer:.0f} CPU-s a layer (goal: {MOST_SECONDS:.0f}), if no critic ends early."
    )
    text = "\n".join([machine(), "", table(HEAD, lines), "", cost])
    print(f"\n{text}")
    if asked.out:
        asked.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
