"""The codec language models as a sweep: what is planned, and which module does what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path
from types import MappingProxyType

from sweeps.codec.cells import CORPORA, HalvedCell, LMCell, Study, TextCell, model_config
from sweeps.codec.packs import CPU_FLOPS, FIXED, GPU_BASIS, TRACKED, UNSEEN, extent, packs, stopped, threads, work
from sweeps.codec.presets import OPTIONS, PRESETS
from sweeps.codec.texts import NONE, arm_name
from sweeps.core.cells import Estimate, Pack, PublishedCell, UserError
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext
from sweeps.launch.first_view import Chart, View
from sweeps.launch.sweep import Sweep
from sweeps.search.halving import Extent


def _units(cells: Sequence[LMCell]) -> list[list[LMCell]]:
    """Cells of an architecture, with or without text, and seed. Rates that compete stay together, with all seeds."""
    units: dict[tuple[str, int | str], list[LMCell]] = {}
    for cell in cells:
        together = cell.contest if isinstance(cell, HalvedCell) else cell.seed
        units.setdefault((arm_name(cell.identity()), together), []).append(cell)
    return list(units.values())


class CodecLMSweep(Sweep[LMCell, Study]):
    """The sweep behind the command line; the work is in `run`, the tokens in `tokens`."""

    name = LMCell.SWEEP
    version = LMCell.VERSION
    question = "which architecture learns audio-codec tokens best at matched size?"
    headline = "nats below unigram"
    named = ("architecture", "text", "lr", "seed")
    tracked = TRACKED
    fixed = FIXED
    unseen = UNSEEN
    view = View(
        params=("architecture", "lr", "seed", "text"),
        metrics=("final_val_nll/ema", "final_val_nll/raw", "unigram_nll", "n_parameters", "tokens_per_second"),
        charts=(
            Chart("Held-out NLL over steps, averaged weights", "line", "val_nll/ema"),
            Chart("Held-out NLL at the end, averaged weights", "bar", "final_val_nll/ema"),
            Chart("Held-out NLL by architecture", "scatter", "final_val_nll/ema", "architecture", x_param=True),
            Chart("Held-out NLL by learning rate", "scatter", "final_val_nll/ema", "lr", x_param=True),
            Chart("Held-out NLL, as it is trained", "line", "live/val_nll/ema"),
            Chart("Training loss, as it is trained", "line", "live/train_loss"),
        ),
    )
    default_preset = "local"
    presets = PRESETS
    follow_up = MappingProxyType({"local": "asterisk", "text_local": "text_asterisk"})
    options = OPTIONS

    def plan(self, preset: Study) -> Sequence[LMCell]:
        preset.check_source(CORPORA)
        for architecture, kind in product(preset.architectures, preset.text or (NONE,)):
            model_config(preset.scale, architecture, text=kind != NONE)
        varied = ("architecture", "lr", "seed", "stop_at")
        shared = {f.name: getattr(preset, f.name) for f in fields(LMCell) if f.name not in varied}
        cells = [
            LMCell(architecture=architecture, lr=lr, seed=seed, **shared)
            for architecture in preset.architectures
            for lr, seed in product(preset.rates(architecture), preset.seeds)
        ]
        if preset.text:
            return [
                TextCell(**cell.identity(), text=kind, text_dropout=0.0 if kind == NONE else preset.text_dropout)
                for cell in cells
                for kind in dict.fromkeys(preset.text)
            ]
        if not preset.rungs:
            return cells
        return [
            HalvedCell(
                **cell.identity(),
                rungs=preset.rungs,
                eta=preset.eta,
                rivals=preset.rates(cell.architecture),
                seeds=preset.seeds,
            )
            for cell in cells
        ]

    def extent(self, preset: Study) -> Extent | None:
        return extent(preset)

    def plan_until(self, preset: Study, amount: int) -> Sequence[LMCell]:
        return stopped(self.plan(preset), preset, amount)

    def checkpoint(self, cell: LMCell, preset: Study, run: RunSettings) -> str:
        return cell.whole().key

    def pack(self, cells: Sequence[LMCell], preset: Study, machine: Machine, run: RunSettings) -> list[Pack[LMCell]]:
        def name(number: int, group: Sequence[LMCell]) -> str:
            return f"{arm_name(group[0].identity())}-{group[0].seed}" if preset.needs_gpu else f"pack{number}"

        return packs(_units(cells), preset, machine, run, name)

    def threads(self, planned: Sequence[LMCell], preset: Study, machine: Machine, run: RunSettings) -> int:
        return threads(len(_units(planned)), preset, machine, run)

    def run(self, pack: Pack[LMCell], preset: Study, context: PackContext) -> None:
        from sweeps.codec.run import run_pack
        from sweeps.launch.workers import fit

        fit(run_pack, pack, preset, context)

    def fingerprint(self, cell: LMCell, preset: Study, run: RunSettings) -> str:
        from sweeps.codec.tokens import fingerprint

        return fingerprint(cell, preset)

    def preflight(self, cells: Sequence[LMCell], preset: Study, run: RunSettings) -> list[str]:
        from sweeps.codec.tokens import check

        check(preset)
        return []

    def estimate(self, cells: Sequence[LMCell], preset: Study, machine: Machine, run: RunSettings) -> Estimate:
        total = work(cells, preset)
        seconds, basis = total.flops / (CPU_FLOPS * machine.cpus), "16 GFLOP/s a core, seen on one machine"
        if preset.needs_gpu:
            seconds, basis = total.gpu_seconds(machine), GPU_BASIS
        return Estimate(
            tokens=total.tokens,
            flops=total.flops,
            memory_bytes=total.memory_bytes,
            seconds=seconds,
            basis=f"{basis}; all clips of full length, which is an upper bound",
        )

    def report(self, cells: Sequence[PublishedCell], preset_name: str, preset: Study, out: Path) -> list[str]:
        from sweeps.codec.report import write

        whole = [c for c in cells if not (c.rows["metric"] == "stopped_at").any()]
        if not whole:
            raise UserError("every published cell was stopped early; run the command again to finish the others")
        lines = write(whole, preset_name, preset, out)
        stopped = len(cells) - len(whole)
        return lines + ([f"halving      {stopped} cells were stopped early and are left out"] if stopped else [])

    def banner(self, preset_name: str, preset: Study) -> list[str]:
        from sweeps.codec.tokens import banner

        return banner(preset)


SWEEP = CodecLMSweep()
