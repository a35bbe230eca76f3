"""The memory-caching study as a sweep: what is planned, and which module does what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from sweeps.caching.arms import arms
from sweeps.caching.cells import VARIABLES, CacheCell, CacheStudy
from sweeps.caching.presets import PRESETS
from sweeps.codec.cells import CORPORA
from sweeps.codec.packs import CPU_FLOPS, FIXED, GPU_BASIS, TRACKED, UNSEEN, extent, packs, stopped, threads, work
from sweeps.core.cells import Estimate, Pack, PublishedCell
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext
from sweeps.launch.first_view import Chart, View
from sweeps.launch.sweep import Sweep
from sweeps.search.halving import Extent

_CPU_OVERHEAD = 0.03  # seconds per step of a small model, in addition to its arithmetic


class MemoryCacheSweep(Sweep[CacheCell, CacheStudy]):
    """The sweep behind the command line; models are trained by `run`, the report is `report`."""

    name = CacheCell.SWEEP
    version = CacheCell.VERSION
    question = "what opens or closes the memory-caching gate, and what is memory caching worth?"
    headline = "nats below unigram"
    named = ("architecture", *VARIABLES, "seed")
    tracked = TRACKED
    fixed = FIXED
    unseen = UNSEEN
    view = View(
        params=("architecture", *VARIABLES, "seed"),
        metrics=("final_val_nll/ema", "final_val_nll/raw", "gate_openness/ema/layer 1"),
        charts=(
            Chart("Held-out NLL without and with caches", "scatter", "final_val_nll/ema", "architecture", x_param=True),
            *(Chart(f"Held-out NLL by {n}", "scatter", "final_val_nll/ema", n, x_param=True) for n in VARIABLES),
            Chart("The gate of layer 1 over steps", "line", "gate_openness/ema/layer 1"),
            Chart("Held-out NLL over steps", "line", "val_nll/ema"),
            Chart("Held-out NLL, as it is trained", "line", "live/val_nll/ema"),
            Chart("Training loss, as it is trained", "line", "live/train_loss"),
        ),
    )
    default_preset = "local"
    presets = PRESETS
    follow_up = MappingProxyType({"local": "thorough"})

    def plan(self, preset: CacheStudy) -> Sequence[CacheCell]:
        preset.check_source(CORPORA, " (the recall task is planted=true)")
        cells: dict[str, CacheCell] = {}
        for arm in arms(preset):
            for cell in (*arm.controls, *arm.cells):
                cells.setdefault(cell.key, cell)
        return list(cells.values())

    def extent(self, preset: CacheStudy) -> Extent | None:
        return extent(preset)

    def plan_until(self, preset: CacheStudy, amount: int) -> Sequence[CacheCell]:
        return stopped(self.plan(preset), preset, amount)

    def checkpoint(self, cell: CacheCell, preset: CacheStudy, run: RunSettings) -> str:
        return cell.whole().key

    def pack(
        self, cells: Sequence[CacheCell], preset: CacheStudy, machine: Machine, run: RunSettings
    ) -> list[Pack[CacheCell]]:
        return packs([[c] for c in cells], preset, machine, run)

    def threads(self, planned: Sequence[CacheCell], preset: CacheStudy, machine: Machine, run: RunSettings) -> int:
        return threads(len(planned), preset, machine, run)

    def run(self, pack: Pack[CacheCell], preset: CacheStudy, context: PackContext) -> None:
        from sweeps.caching.run import run_pack
        from sweeps.launch.workers import fit

        fit(run_pack, pack, preset, context)

    def fingerprint(self, cell: CacheCell, preset: CacheStudy, run: RunSettings) -> str:
        from sweeps.codec.tokens import fingerprint

        return fingerprint(cell, preset.token_study(planted=cell.corpus == "recall"))

    def preflight(self, cells: Sequence[CacheCell], preset: CacheStudy, run: RunSettings) -> list[str]:
        from sweeps.codec.tokens import check

        check(preset.token_study(planted=False))
        return []

    def estimate(self, cells: Sequence[CacheCell], preset: CacheStudy, machine: Machine, run: RunSettings) -> Estimate:
        total = work(cells, preset)
        if preset.needs_gpu:
            seconds, basis = total.gpu_seconds(machine), GPU_BASIS
        else:
            seconds = (total.flops / CPU_FLOPS + total.steps * _CPU_OVERHEAD) / machine.cpus
            basis = "16 GFLOP/s and 30 ms a step on a core, seen on one machine"
        return Estimate(
            tokens=total.tokens, flops=total.flops, memory_bytes=total.memory_bytes, seconds=seconds, basis=basis
        )

    def report(self, cells: Sequence[PublishedCell], preset_name: str, preset: CacheStudy, out: Path) -> list[str]:
        from sweeps.caching.report import write

        return write(cells, preset_name, preset, out)

    def banner(self, preset_name: str, preset: CacheStudy) -> list[str]:
        from sweeps.codec.corpora import PLANTED
        from sweeps.codec.tokens import banner

        return [*banner(preset.token_study(planted=False)), *([PLANTED] if preset.planted else [])]


SWEEP = MemoryCacheSweep()
