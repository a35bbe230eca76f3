"""A sweep whose cells are points of a bowl, computed in this process: what searches are tested with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from sweeps.core.cells import Cell, Estimate, Pack, PublishedCell, Row, UserError, digest
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext
from sweeps.launch.sweep import Sweep
from sweeps.ledger.ledger import Ledger
from sweeps.search.halving import Extent
from sweeps.search.search import Search


@dataclass(frozen=True, kw_only=True)
class BowlCell(Cell):
    SWEEP: ClassVar[str] = "bowl"
    VERSION: ClassVar[str] = "1"
    arm: str
    x: float
    y: float
    n: int
    seed: int
    stop_at: int = 0  # of the preset's steps; 0: the whole

    def __post_init__(self) -> None:
        if self.n > 90:
            raise UserError(f"n={self.n} exceeds 90; choose n <= 90")

    @property
    def depth(self) -> float:
        centre = {"left": -1.0, "right": 2.0}[self.arm]
        return (self.x - centre) ** 2 + math.log10(self.y / 1e-2) ** 2 + 0.01 * abs(self.n - 8) + 0.01 * self.seed

    @property
    def measured(self) -> float:
        """The depth, or what a trial that was stopped shows of it: further from it the earlier."""
        return self.depth + (int(self.key, 16) % 1000 / 1000 / self.stop_at if self.stop_at else 0.0)


@dataclass(frozen=True, kw_only=True)
class BowlPreset:
    arms: tuple[str, ...] = ("left",)
    x: tuple[float, ...] = (0.0,)
    y: float = 1e-2
    n: int = 8
    seeds: tuple[int, ...] = (0,)
    width: int = 7  # no cell depends on it
    steps: int = 27


def rows(cell: BowlCell) -> list[Row]:
    spoilt = math.nan if cell.n == 13 else 0.0
    where = [Row("loss", cell.depth + 1, params={"weights": w}) for w in ("ema", "raw")]
    return [Row("depth", cell.measured + spoilt), Row("size", cell.n), *where, Row("curve", 1.0, params={"step": 3})]


class BowlSweep(Sweep[BowlCell, BowlPreset]):
    name = "bowl"
    version = "1"
    question = "how deep is the bowl?"
    default_preset = "one"
    tracked = ("weights",)
    fixed: Mapping[str, str] = {"arms": "its bowls are not compared"}
    presets: Mapping[str, BowlPreset] = {"one": BowlPreset(), "two": BowlPreset(arms=("left", "right"))}

    def plan(self, preset: BowlPreset) -> Sequence[BowlCell]:
        return [
            BowlCell(arm=arm, x=x, y=preset.y, n=preset.n, seed=seed)
            for arm in preset.arms
            for x in preset.x
            for seed in preset.seeds
        ]

    def extent(self, preset: BowlPreset) -> Extent | None:
        return Extent("steps", preset.steps) if preset.steps else None

    def plan_until(self, preset: BowlPreset, amount: int) -> Sequence[BowlCell]:
        return [replace(cell, stop_at=amount if amount < preset.steps else 0) for cell in self.plan(preset)]

    def checkpoint(self, cell: BowlCell, preset: BowlPreset, run: RunSettings) -> str:
        return replace(cell, stop_at=0).key

    def pack(
        self, cells: Sequence[BowlCell], preset: BowlPreset, machine: Machine, run: RunSettings
    ) -> list[Pack[BowlCell]]:
        return [Pack(name=f"pack-{cell.key}", cells=(cell,)) for cell in cells]

    def run(self, pack: Pack[BowlCell], preset: BowlPreset, context: PackContext) -> None:
        for cell in pack.cells:
            if cell.n == 17:
                raise UserError("n=17 is refused by the work; choose another")
            context.publish(cell, rows(cell))
            if context.run.keep_checkpoints:
                name = self.checkpoint(cell, preset, context.run)
                context.ledger.store.replace(f"_work/{name}/latest.json", b"{}")

    def fingerprint(self, cell: BowlCell, preset: BowlPreset, run: RunSettings) -> str:
        return digest(cell.key)

    def estimate(self, cells: Sequence[BowlCell], preset: BowlPreset, machine: Machine, run: RunSettings) -> Estimate:
        return Estimate(seconds=sum(36.0 * c.n for c in cells), basis="a rule")

    def report(self, cells: Sequence[PublishedCell], preset_name: str, preset: BowlPreset, out: Path) -> list[str]:
        (out / "report.md").write_text(f"{len(cells)} cells", encoding="utf-8")
        return []

    def banner(self, preset_name: str, preset: BowlPreset) -> list[str]:
        return ["no data"]


SWEEP = BowlSweep()


def publish(ledger: Ledger, cell: BowlCell) -> None:
    if cell.n == 17:
        ledger.record_failure(cell, "n=17 is refused by the work; choose another", attempts=1)
    else:
        ledger.publish(cell, rows(cell), {}, {"fingerprint": digest(cell.key)})


def work(search: Search[Any], most: int = 10**9) -> int:
    """Run at most so many missing cells, asking for batches as they are due; returns how many ran."""
    ran = 0
    while True:
        cells = search.advance(record=True)
        gone = {c.key for c in cells if search.known.closed(c.key)}
        missing = [c for c in cells if c.key not in gone]
        if not missing:
            return ran
        for cell in missing:
            if ran == most:
                return ran
            publish(search.ledger, cell)
            ran += 1
