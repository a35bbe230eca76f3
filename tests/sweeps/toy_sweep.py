"""A sweep without science, for tests of the machinery: squares of numbers, slow, failing or crashing on demand."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sweeps.core.cells import Cell, Estimate, Pack, PublishedCell, Row, UserError, digest
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext
from sweeps.launch.sweep import Sweep


@dataclass(frozen=True, kw_only=True)
class Square(Cell):
    SWEEP: ClassVar[str] = "toy"
    VERSION: ClassVar[str] = "1"
    n: int
    model: str = "square"


@dataclass(frozen=True, kw_only=True)
class Toy:
    n: tuple[int, ...] = (1, 2, 3)
    pack_size: int = 2
    seconds: float = 0.0
    bad: tuple[int, ...] = ()
    crash: tuple[int, ...] = ()  # once
    deadly: tuple[int, ...] = ()  # always
    on_workers: bool = False
    salt: str = ""
    scratch: str = ""


class ToySweep(Sweep[Square, Toy]):
    name = "toy"
    version = "1"
    question = "what is the square of a number?"
    headline = "square"
    default_preset = "small"
    presets: Mapping[str, Toy] = {"small": Toy(), "many": Toy(n=tuple(range(200)), pack_size=50)}

    def plan(self, preset: Toy) -> list[Square]:
        if any(n < 0 for n in preset.n):
            raise UserError(f"n={min(preset.n)} is negative; choose n >= 0")
        return [Square(n=n) for n in preset.n]

    def pack(self, cells: Sequence[Square], preset: Toy, machine: Machine, run: RunSettings) -> list[Pack[Square]]:
        size = preset.pack_size
        workers = run.workers if preset.on_workers else 0
        starts = range(0, len(cells), size)
        return [Pack(name=f"pack{i}", cells=tuple(cells[i : i + size]), workers=workers) for i in starts]

    def run(self, pack: Pack[Square], preset: Toy, context: PackContext) -> None:
        if pack.workers:
            from sweeps.launch.workers import fit

            fit(work, pack, preset, context)
        else:
            work(pack.cells, preset, context)

    def fingerprint(self, cell: Square, preset: Toy, run: RunSettings) -> str:
        return digest([cell.key, preset.salt])

    def estimate(self, cells: Sequence[Square], preset: Toy, machine: Machine, run: RunSettings) -> Estimate:
        return Estimate(seconds=preset.seconds * len(cells), basis="sleeping")

    def report(self, cells: Sequence[PublishedCell], preset_name: str, preset: Toy, out: Path) -> list[str]:
        (out / "report.md").write_text("\n".join(f"{c.identity['n']} {c.rows.value[0]}" for c in cells))
        return [f"sum          {sum(c.rows.value[0] for c in cells):.0f}"]

    def banner(self, preset_name: str, preset: Toy) -> list[str]:
        return ["a toy for the machinery's tests"]


def work(cells: Sequence[Square], preset: Toy, context: PackContext) -> None:
    for done, cell in enumerate(cells):
        if preset.scratch:
            with open(Path(preset.scratch, f"{cell.n}.tries"), "a") as f:
                f.write("x")
        context.begin(cell, cell=cell.key)
        if cell.n in preset.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if cell.n in preset.bad:
            raise UserError(f"n={cell.n} is on the list of bad numbers; choose another")
        if cell.n in preset.crash:
            once = Path(preset.scratch, f"{cell.n}.crashed")
            if not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        context.check_stop()
        time.sleep(preset.seconds)
        context.curve(cell, 1, {"half": cell.n**2 / 2})
        rows = [Row("square", cell.n**2), Row("curve", 1.0, params={"step": 1})]
        context.publish(cell, rows, {"value.txt": str(cell.n**2).encode()})
        context.progress(done=done + 1, total=len(cells), best=float(cell.n**2))


SWEEP = ToySweep()

if __name__ == "__main__":
    from sweeps.launch.command import main

    sys.exit(main(SWEEP))
