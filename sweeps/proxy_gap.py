"""The SAE proxy gap: does reconstruction fidelity rank sparse autoencoders as the language model itself does?

python sweeps/proxy_gap.py                    stand-in language models, minutes, offline
python sweeps/proxy_gap.py --preset smollm2   a real pretrained 135M language model, offline
python sweeps/proxy_gap.py --preset fast2     the study's grid on Pythia and the Pile
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.registry import HOST_LMS
from sweeps.core.cells import Cell, Estimate, Pack, PublishedCell, UserError, nearest
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings

DEPTHS = ("early", "mid", "late")
_TOKEN_CHOICE = ("drop_positions", "max_norm_multiple")
PYTHIA = ("pythia-70m", "pythia-160m", "pythia-410m")


@dataclass(frozen=True, kw_only=True)
class SAECell(Cell):
    """One trained and evaluated SAE. Shapes and rates are those of the training stream's model."""

    SWEEP: ClassVar[str] = "proxy_gap"
    VERSION: ClassVar[str] = "1"

    model: str
    layer: int
    depth: str
    k: int
    seed: int
    tokens: int  # training budget
    stream: str  # "pile" or "embedded"
    context: int
    d_sae: int
    batch_tokens: int
    shuffle_sequences: int  # sequences whose activations are mixed before they are cut into batches
    lr: float
    schedule: str
    warmup_steps: int
    decay_steps: int
    aux_coefficient: float
    dead_after_steps: int
    eval_sequences: int
    lm_dtype: str
    # tokens that neither training nor evaluation looks at; part of the identity where they are set
    drop_positions: int = 0
    max_norm_multiple: float = 0.0

    def identity(self) -> dict[str, Any]:
        fields = super().identity()
        for name in _TOKEN_CHOICE:
            if not fields[name]:
                del fields[name]
        return fields

    def __post_init__(self) -> None:
        if self.k > self.d_sae:
            raise UserError(f"k={self.k} exceeds d_sae={self.d_sae}; choose k <= d_sae")
        if self.k < 1:
            raise UserError(f"k={self.k} leaves no feature active; choose k >= 1")
        if self.tokens % self.batch_tokens:
            low = self.tokens // self.batch_tokens * self.batch_tokens
            raise UserError(
                f"tokens={self.tokens} is not a multiple of batch_tokens={self.batch_tokens}; choose tokens="
                f"{low or self.batch_tokens} or {low + self.batch_tokens}"
            )
        if self.shuffle_sequences * self.context % self.batch_tokens:
            raise UserError(
                f"shuffle_sequences={self.shuffle_sequences} x context={self.context} is not a multiple of "
                f"batch_tokens={self.batch_tokens}; change shuffle_sequences"
            )
        spec = HOST_LMS.get(self.model)
        if spec is not None and not 0 <= self.layer < spec.n_layers:
            raise UserError(f"layer={self.layer} is out of range for {self.model}; choose 0 to {spec.n_layers - 1}")
        if self.schedule not in ("constant", "wsd"):
            raise UserError(
                f"schedule={self.schedule!r} cannot serve nested budgets; choose constant, or wsd (one decay branch "
                "per budget)"
            )
        if self.schedule == "wsd" and self.steps < self.warmup_steps + self.decay_steps:
            raise UserError(
                f"tokens={self.tokens} are {self.steps} steps, fewer than warmup_steps={self.warmup_steps} + "
                f"decay_steps={self.decay_steps}; choose a larger budget or shorter phases"
            )
        if self.lm_dtype not in ("float32", "bfloat16"):
            raise UserError(f"lm_dtype={self.lm_dtype!r} is not known; choose float32 or bfloat16")
        if not 0 <= self.drop_positions < self.context:
            raise UserError(
                f"drop_positions={self.drop_positions} leaves no token of context={self.context}; choose 0 to "
                f"{self.context - 1}"
            )
        if self.max_norm_multiple and not 1 < self.max_norm_multiple < math.inf:
            raise UserError(
                f"max_norm_multiple={self.max_norm_multiple:g} would leave out half of the tokens; choose more than 1 "
                "median norm, or 0 to keep all"
            )

    @property
    def steps(self) -> int:
        """Training steps of the budget."""
        return self.tokens // self.batch_tokens

    def trajectory(self) -> tuple[Any, ...]:
        """What cells of nested budgets share: all but the budget."""
        return self._trajectory

    @functools.cached_property
    def _trajectory(self) -> tuple[Any, ...]:
        plain = tuple(v for name, v in self.identity().items() if name not in ("tokens", *_TOKEN_CHOICE))
        return plain + tuple((name, v) for name, v in self.identity().items() if name in _TOKEN_CHOICE)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A preset. Every field can be changed with `--set field=value` (lists with commas)."""

    models: tuple[str, ...]
    k: tuple[int, ...]
    tokens: tuple[int, ...]
    depths: tuple[str, ...] = DEPTHS
    layers: tuple[int, ...] = ()  # explicit blocks instead of depths
    seeds: tuple[int, ...] = (0,)
    stream: str = "pile"
    context: int = 256
    expansion: int = 32  # d_sae / d_model
    batch_tokens: int = 4000
    shuffle_sequences: int = 500
    lr: float = 3e-4
    schedule: str = "constant"
    warmup_steps: int = 500
    decay_steps: int = 0
    aux_coefficient: float = 1.0
    dead_after_steps: int = 1000
    eval_sequences: int = 200
    lm_dtype: str = "float32"
    drop_positions: int = 0  # first tokens of each sequence that are left out of training and evaluation
    max_norm_multiple: float = 0.0  # tokens longer than so many times the median norm are, too; 0: none


PRESETS: Mapping[str, Grid] = {
    "local": Grid(
        models=("standin-small", "standin-large"),
        k=(4, 8, 16, 32),
        tokens=(81_920, 327_680),
        seeds=(0, 1),
        stream="embedded",
        batch_tokens=2048,
        shuffle_sequences=128,
        lr=1e-3,
        warmup_steps=10,
        dead_after_steps=50,
        eval_sequences=48,
    ),
    "smollm2": Grid(
        models=("smollm2-135m",),
        k=(8, 16, 32, 64, 128),
        tokens=(102_400, 409_600),
        stream="embedded",
        expansion=8,
        batch_tokens=2048,
        shuffle_sequences=128,
        lr=1e-3,
        warmup_steps=20,
        dead_after_steps=100,
        eval_sequences=48,
        lm_dtype="bfloat16",
    ),
    "fast2": Grid(models=("pythia-70m", "pythia-410m"), k=(8, 16, 32, 64, 128, 256), tokens=(10_000_000,)),
    "fast3": Grid(models=PYTHIA, depths=("mid",), k=(8, 16, 32, 64), tokens=(10_000_000,)),
    "phase2": Grid(
        models=("pythia-70m", "pythia-410m"),
        depths=("mid",),
        k=(8, 16),
        tokens=(10_000_000, 50_000_000, 100_000_000),
        seeds=(0, 1, 2, 3),
    ),
    "budget_k32": Grid(
        models=("pythia-70m", "pythia-410m"), depths=("mid",), k=(32,), tokens=(10_000_000, 100_000_000)
    ),
    "bridge": Grid(
        models=PYTHIA,
        k=(8, 16, 32, 64, 128, 256),
        tokens=(10_000_000, 50_000_000, 100_000_000),
        seeds=(0, 1, 2),
    ),
}


class ProxyGap:
    """The sweep behind the command line; the work is in `_sae_grid`, `_sae_eval` and `_sae_plan`."""

    name = SAECell.SWEEP
    version = SAECell.VERSION
    question = "does reconstruction fidelity (R²) rank SAEs as the patched language model does?"
    headline = "CE_rec"
    named = ("model", "depth", "layer", "k", "seed", "tokens")
    default_preset = "local"
    presets = PRESETS

    def plan(self, preset: Grid) -> Sequence[SAECell]:
        cells: list[SAECell] = []
        for model in preset.models:
            spec = HOST_LMS.get(model)
            if spec is None:
                raise UserError(
                    f"model {model!r} is not known{nearest(model, HOST_LMS)}; models: {', '.join(HOST_LMS)}"
                )
            if preset.layers:
                places = [(f"L{layer}", layer) for layer in preset.layers]
            else:
                unknown = [d for d in preset.depths if d not in spec.depths]
                if unknown:
                    raise UserError(f"depth {unknown[0]!r} is not known; choose from {', '.join(spec.depths)}")
                places = [(depth, spec.depths[depth]) for depth in preset.depths]
            cells += [
                self._cell(preset, model, spec.d_model, depth, layer, k, seed, tokens)
                for (depth, layer), k, seed, tokens in product(places, preset.k, preset.seeds, preset.tokens)
            ]
        return cells

    def _cell(
        self, preset: Grid, model: str, d_model: int, depth: str, layer: int, k: int, seed: int, tokens: int
    ) -> SAECell:
        return SAECell(
            model=model,
            layer=layer,
            depth=depth,
            k=k,
            seed=seed,
            tokens=tokens,
            stream=preset.stream,
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
            lm_dtype=preset.lm_dtype,
            drop_positions=preset.drop_positions,
            max_norm_multiple=preset.max_norm_multiple,
        )

    def pack(self, cells: Sequence[Cell], preset: Grid, machine: Machine, run: RunSettings) -> list[Pack]:
        from sweeps._sae_plan import make_packs

        return make_packs([c for c in cells if isinstance(c, SAECell)], machine, run)

    def threads(self, planned: Sequence[Cell], preset: Grid, machine: Machine, run: RunSettings) -> int:
        from sweeps._sae_plan import threads

        return threads([c for c in planned if isinstance(c, SAECell)], machine, run)

    def run(self, pack: Pack, preset: Grid, context: Any) -> None:
        from sweeps._sae_grid import train_pack

        train_pack([c for c in pack.cells if isinstance(c, SAECell)], context)

    def fingerprint(self, cell: Cell, preset: Grid, run: RunSettings) -> str:
        from sweeps._sae_sources import fingerprint

        assert isinstance(cell, SAECell)
        return fingerprint(cell, run)

    def estimate(self, cells: Sequence[Cell], preset: Grid, machine: Machine, run: RunSettings) -> Estimate:
        from sweeps._sae_plan import estimate

        return estimate([c for c in cells if isinstance(c, SAECell)], machine, run)

    def pin(self, cells: Sequence[Cell], run: RunSettings) -> RunSettings:
        from sweeps._sae_sources import pin

        return pin([c for c in cells if isinstance(c, SAECell)], run)

    def remarks(self, preset: Grid, run: RunSettings) -> list[str]:
        from sweeps._sae_sources import remarks

        return remarks(preset.stream, run)

    def preflight(self, cells: Sequence[Cell], preset: Grid, run: RunSettings) -> list[str]:
        from sweeps._sae_sources import preflight

        return preflight([c for c in cells if isinstance(c, SAECell)], run)

    def report(self, cells: Sequence[PublishedCell], preset_name: str, preset: Grid, out: Path) -> list[str]:
        from sweeps._sae_report import write

        return write(cells, preset_name, preset, self.presets[preset_name], out)

    def banner(self, preset_name: str, preset: Grid) -> list[str]:
        from sweeps._sae_sources import banner

        lines = banner(preset_name, preset.models, preset.stream)
        steps = min(preset.tokens, default=0) // preset.batch_tokens
        if preset.schedule == "constant" and steps < preset.warmup_steps:
            lines.append(
                f"the smallest budget is {steps} steps and ends inside the learning rate's warm-up of "
                f"{preset.warmup_steps} steps"
            )
        return lines


SWEEP = ProxyGap()

if __name__ == "__main__":
    from sweeps.launch.command import main

    sys.exit(main("sweeps.proxy_gap"))
