"""The SAE proxy gap as a sweep: what is planned, and which module does what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from types import MappingProxyType

from sweeps.core.cells import Estimate, Pack, PublishedCell, UserError
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext
from sweeps.launch.first_view import Chart, View
from sweeps.launch.sweep import BY_CHANCE, Sweep
from sweeps.sae.cells import Grid, SAECell, released
from sweeps.sae.lms import spec_of
from sweeps.sae.presets import PRESETS
from sweeps.search.halving import Extent

_SETTLED = 0.99  # of its way that a threshold has come after 459 steps


class ProxyGap(Sweep[SAECell, Grid]):
    """The sweep behind the command line; the work is in `train`, `evaluate` and `packs`."""

    name = SAECell.SWEEP
    version = SAECell.VERSION
    question = "does reconstruction fidelity (R²) rank SAEs as the patched language model does?"
    headline = "CE_rec"
    named = ("model", "depth", "layer", "k", "seed", "tokens")
    fixed = {"seeds": BY_CHANCE} | dict.fromkeys(
        (
            "models",
            "stream",
            "context",
            "eval_sequences",
            "eval_part",
            "lm_dtype",
            "drop_positions",
            "max_norm_multiple",
        ),
        "its trials would be scored on another model or other tokens",
    )
    unseen = "eval_part"
    view = View(
        params=("model", "depth", "layer", "k", "seed", "tokens"),
        metrics=("ce_rec", "r2", "r2_no_sinks", "cosine", "nmse", "swd", "abs_gdelta"),
        charts=(
            Chart("CE_rec against R²", "scatter", "ce_rec", "r2"),
            Chart("CE_rec against R² without sinks", "scatter", "ce_rec", "r2_no_sinks"),
            Chart("CE_rec by k", "scatter", "ce_rec", "k", x_param=True),
            Chart("CE_rec by model", "scatter", "ce_rec", "model", x_param=True),
            Chart("Loss over tokens", "line", "train_loss"),
            Chart("Loss over tokens, as it is trained", "line", "live/train_loss"),
        ),
    )
    default_preset = "local"
    presets = PRESETS
    follow_up = MappingProxyType({"local": "smollm2"})

    def plan(self, preset: Grid) -> Sequence[SAECell]:
        if _audits(preset):
            from sweeps.sae.released import plan_released

            return plan_released(preset)
        cells: list[SAECell] = []
        for model in preset.models:
            spec = spec_of(model)
            if preset.layers:
                wrong = [layer for layer in preset.layers if not 0 <= layer < spec.n_layers]
                if wrong:
                    raise UserError(f"layer={wrong[0]} is out of range for {model}; choose 0 to {spec.n_layers - 1}")
                places = [(f"L{layer}", layer) for layer in preset.layers]
            else:
                unknown = [d for d in preset.depths if d not in spec.depths]
                if unknown:
                    raise UserError(f"depth {unknown[0]!r} is not known; choose from {', '.join(spec.depths)}")
                places = [(depth, spec.depths[depth]) for depth in preset.depths]
            cells += [
                self._cell(preset, model, spec.d_model, place, sae, k, seed, tokens)
                for sae, place, k, seed, tokens in product(preset.sae, places, preset.k, preset.seeds, preset.tokens)
            ]
        return cells

    def _cell(
        self, preset: Grid, model: str, d_model: int, place: tuple[str, int], sae: str, k: int, seed: int, tokens: int
    ) -> SAECell:
        return SAECell(
            model=model,
            layer=place[1],
            depth=place[0],
            sae=sae,
            k=k,
            seed=seed,
            tokens=tokens,
            stream="text" if preset.text else preset.stream,
            context=preset.context,
            d_sae=preset.expansion * d_model,
            batch_tokens=preset.batch_tokens,
            shuffle_sequences=preset.shuffle_sequences,
            lr=preset.lr,
            schedule=preset.schedule,
            warmup_steps=preset.warmup_steps,
            decay_steps=preset.decay_steps,
            aux_coefficient=preset.aux_coefficient,
            dead_after_steps=preset.dead_after_steps,
            eval_sequences=preset.eval_sequences,
            eval_part=preset.eval_part,
            lm_dtype=preset.lm_dtype,
            drop_positions=preset.drop_positions,
            max_norm_multiple=preset.max_norm_multiple,
            hook=preset.hook,
            blocks=preset.blocks,
            text=preset.text,
            text_column=preset.text_column,
            rungs=preset.rungs,
            legibility=preset.legibility,
            information=preset.information,
        )

    def extent(self, preset: Grid) -> Extent | None:
        """The largest budget, in whole batches."""
        if _audits(preset) or not preset.tokens:
            return None
        return Extent("tokens", max(preset.tokens), preset.batch_tokens)

    def plan_until(self, preset: Grid, amount: int) -> Sequence[SAECell]:
        return self.plan(replace(preset, tokens=(amount,)))

    def checkpoint(self, cell: SAECell, preset: Grid, run: RunSettings) -> str:
        from sweeps.sae.origin import trajectory_name

        return trajectory_name(cell, run)

    def pack(self, cells: Sequence[SAECell], preset: Grid, machine: Machine, run: RunSettings) -> list[Pack[SAECell]]:
        if audits := released(cells):
            from sweeps.sae.released import pack_released

            return pack_released(audits, machine, run)
        from sweeps.sae.packs import make_packs

        return make_packs(cells, machine, run)

    def threads(self, planned: Sequence[SAECell], preset: Grid, machine: Machine, run: RunSettings) -> int:
        if released(planned):
            from sweeps.sae.released import threads_released

            return threads_released(machine, run)
        from sweeps.sae.packs import threads

        return threads(planned, machine, run)

    def run(self, pack: Pack[SAECell], preset: Grid, context: PackContext) -> None:
        if audits := released(pack.cells):
            from sweeps.sae.released import audit_pack

            audit_pack(audits, context)
            return
        from sweeps.sae.report import THRESHOLDS, thresholds_of
        from sweeps.sae.train import train_pack

        thresholds = thresholds_of(preset)
        record = {"digest": thresholds.digest, **asdict(thresholds)}
        train_pack(pack.cells, context, {THRESHOLDS: json.dumps(record).encode()})

    def fingerprint(self, cell: SAECell, preset: Grid, run: RunSettings) -> str:
        from sweeps.sae.origin import fingerprint

        return fingerprint(cell, run)

    def estimate(self, cells: Sequence[SAECell], preset: Grid, machine: Machine, run: RunSettings) -> Estimate:
        if audits := released(cells):
            from sweeps.sae.released import estimate_released

            return estimate_released(audits, machine, run)
        from sweeps.sae.estimate import estimate

        return estimate(cells, machine, run)

    def pin(self, cells: Sequence[SAECell], run: RunSettings) -> RunSettings:
        from sweeps.sae.origin import pin

        return pin(cells, run)

    def remarks(self, preset: Grid, run: RunSettings) -> list[str]:
        from sweeps.sae.sources import remarks

        return remarks(preset.stream, run)

    def preflight(self, cells: Sequence[SAECell], preset: Grid, run: RunSettings) -> list[str]:
        from sweeps.sae.preflight import preflight

        return preflight(cells, run)

    def report(self, cells: Sequence[PublishedCell], preset_name: str, preset: Grid, out: Path) -> list[str]:
        if _audits(preset):
            from sweeps.sae.report import write_released

            return write_released(cells, preset_name, preset, out)
        from sweeps.sae.report import write

        return write(cells, preset_name, preset, self.presets[preset_name], out)

    def banner(self, preset_name: str, preset: Grid) -> list[str]:
        from sweeps.sae.sources import banner

        if _audits(preset):
            models = sorted({cell.model for cell in self.plan(preset)})
            return [
                f"{len(preset.saes)} SAEs that were trained elsewhere, read as weights alone; nothing is trained here",
                *banner(preset_name, models, preset.stream, preset.text),
            ]
        lines = banner(preset_name, preset.models, preset.stream, preset.text)
        steps = min(preset.tokens, default=0) // preset.batch_tokens
        if preset.schedule == "constant" and steps < preset.warmup_steps:
            lines.append(
                f"the smallest budget is {steps} steps and ends inside the learning rate's warm-up of "
                f"{preset.warmup_steps} steps"
            )
        if set(preset.sae) - {"topk"}:
            from models.sae.jumprelu import THRESHOLD_RATE  # here: a plan of TopK cells does without torch

            reached = 1 - (1 - THRESHOLD_RATE) ** steps
            if reached < _SETTLED:
                lines.append(
                    f"BatchTopK and Matryoshka: the threshold has come {reached:.0%} of its way after {steps} steps, "
                    "the smallest budget (SAELens' running average, from zero): more than k features fire, see l0"
                )
        return lines


def _audits(preset: Grid) -> bool:
    """Whether a preset audits trained SAEs: it names some, or has nothing to train."""
    return bool(preset.saes) or not preset.k


SWEEP = ProxyGap()
