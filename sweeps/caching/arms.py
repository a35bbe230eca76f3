"""The arms of the memory-caching study: the base setting, one variable changed at a time, and each arm's control."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sweeps.caching.cells import CACHE, CACHED, CONTROL, PLANTED_SETTING, VARIABLES, CacheCell, CacheStudy

BASE, TOGETHER = "base", "together"
PLANTED_BASE, PLANTED_NORMALIZED = "recall", "recall, normalized_retrieval"


@dataclass(frozen=True)
class Arm:
    """A setting with caches: its name, the variable it changes and to what, and its cells and controls by seed."""

    name: str
    variable: str
    value: str
    cells: tuple[CacheCell, ...]
    controls: tuple[CacheCell, ...]

    @property
    def planted(self) -> bool:
        return self.cells[0].corpus == "recall"


def arms(study: CacheStudy) -> Iterator[Arm]:
    """The base setting, its variants, everything together, and the planted task. Raises UserError for bad values."""
    base = {name: getattr(study, name)[0] for name in VARIABLES}
    base |= {name: getattr(study, name) for name in (*PLANTED_SETTING, "eval_part") if name not in VARIABLES}
    yield _arm(BASE, "", "", base, base, study.seeds)
    for variable in study.variables:
        for value in dict.fromkeys(getattr(study, variable)[1:]):
            if value != base[variable]:
                yield _arm(
                    f"{variable}={spelled(variable, value)}",
                    variable,
                    spelled(variable, value),
                    base | {variable: value},
                    base,
                    study.seeds,
                )
    if study.together:
        last = {name: getattr(study, name)[-1] for name in study.together}
        what = ", ".join(f"{name}={spelled(name, value)}" for name, value in last.items())
        yield _arm(TOGETHER, TOGETHER, what, base | last, base, study.seeds)
    if study.planted:
        planted = {**PLANTED_SETTING, "eval_part": study.eval_part}
        yield _arm(PLANTED_BASE, "", "", planted, planted, study.seeds)
        changed = planted | {"normalized_retrieval": True}
        yield _arm(PLANTED_NORMALIZED, "normalized_retrieval", "True", changed, planted, study.seeds)


def spelled(variable: str, value: Any) -> str:
    """A value as the report prints it."""
    if value == 0 and variable in ("rank", "train_clips"):
        return "full" if variable == "rank" else "all"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _arm(
    name: str, variable: str, value: str, setting: Mapping[str, Any], base: Mapping[str, Any], seeds: tuple[int, ...]
) -> Arm:
    control = {**setting, **{option: base[option] for option in CACHE}}
    return Arm(
        name,
        variable,
        value,
        tuple(CacheCell(architecture=CACHED, seed=seed, **setting) for seed in seeds),
        tuple(CacheCell(architecture=CONTROL, seed=seed, **control) for seed in seeds),
    )
