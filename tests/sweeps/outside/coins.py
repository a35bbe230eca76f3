"""A sweep in one file, wherever that is: how often does a coin of known bias show heads?

PYTHONPATH=CHECKOUT python coins.py --set bias=0.1,0.5
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import ClassVar

from sweeps.core.cells import Cell, Estimate, Pack, PublishedCell, Row, UserError, digest
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.command import main
from sweeps.launch.context import PackContext
from sweeps.launch.sweep import Sweep


@dataclass(frozen=True, kw_only=True)
class CoinCell(Cell):
    SWEEP: ClassVar[str] = "coins"
    VERSION: ClassVar[str] = "1"

    bias: float
    seed: int
    tosses: int


@dataclass(frozen=True, kw_only=True)
class CoinPreset:
    bias: tuple[float, ...] = (0.25, 0.5)
    seeds: tuple[int, ...] = (0, 1)
    tosses: int = 100


class CoinSweep(Sweep[CoinCell, CoinPreset]):
    name = CoinCell.SWEEP
    version = CoinCell.VERSION
    question = "how often does a coin of known bias show heads?"
    headline = "heads"
    named = ("bias", "seed")
    default_preset = "few"
    presets: Mapping[str, CoinPreset] = {"few": CoinPreset(), "many": CoinPreset(tosses=10_000)}

    def plan(self, preset: CoinPreset) -> Sequence[CoinCell]:
        if wrong := [p for p in preset.bias if not 0.0 <= p <= 1.0]:
            raise UserError(f"bias={wrong[0]} is no probability; choose 0 <= bias <= 1")
        return [CoinCell(bias=p, seed=s, tosses=preset.tosses) for p, s in product(preset.bias, preset.seeds)]

    def pack(
        self, cells: Sequence[CoinCell], preset: CoinPreset, machine: Machine, run: RunSettings
    ) -> list[Pack[CoinCell]]:
        return [Pack(name="all", cells=tuple(cells))]

    def run(self, pack: Pack[CoinCell], preset: CoinPreset, context: PackContext) -> None:
        for cell in pack.cells:
            context.check_stop()
            rng = random.Random(cell.seed)
            heads = sum(rng.random() < cell.bias for _ in range(cell.tosses))
            context.publish(cell, [Row("heads", heads / cell.tosses)])

    def fingerprint(self, cell: CoinCell, preset: CoinPreset, run: RunSettings) -> str:
        return digest(["random.Random", cell.key])

    def estimate(self, cells: Sequence[CoinCell], preset: CoinPreset, machine: Machine, run: RunSettings) -> Estimate:
        return Estimate(seconds=1e-7 * sum(c.tosses for c in cells), basis="10 million tosses per second")

    def report(self, cells: Sequence[PublishedCell], preset_name: str, preset: CoinPreset, out: Path) -> list[str]:
        lines = [f"| {c.identity['bias']} | {c.identity['seed']} | {c.rows.value[0]:.3f} |" for c in cells]
        text = "\n".join(["| bias | seed | heads |", "|---|---|---|", *lines])
        (out / "report.md").write_text(text, encoding="utf-8")
        return []

    def banner(self, preset_name: str, preset: CoinPreset) -> list[str]:
        return ["pseudorandom coins, no data"]


SWEEP = CoinSweep()

if __name__ == "__main__":
    sys.exit(main(SWEEP))
