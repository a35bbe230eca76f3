"""How a sweep is run, and the `--set` texts that change it or a preset. None of it is part of a cell's identity."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sweeps.core.cells import UserError, nearest
from sweeps.core.gpus import asked_types

_DIGITS = 18  # of a whole number: what fits 64 bits, where arrays and tables keep it


def add_settings(parser: argparse.ArgumentParser, options: Mapping[str, str]) -> None:
    """Give a command line `--set FIELD=VALUE`, and further options, each for the field that it sets."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the preset"
    )
    for option, name in options.items():
        setting = f"{name}={{}}".format
        parser.add_argument(
            option, dest="set", action="append", type=setting, metavar="VALUE", help=f"short for --set {name}=VALUE"
        )


def apply_settings(values: Sequence[str], *targets: Any) -> list[Any]:
    """Apply `field=value` texts to the first of the frozen dataclass values that has the field.

    The text is parsed by the field's annotation: int, float, bool, str, tuple[X, ...] (comma-separated), X | None.
    Returns the replaced values in order. Raises UserError for an unknown field or an unreadable value.
    """
    out = list(targets)
    hints = [typing.get_type_hints(type(t)) for t in targets]
    names = {f.name for t in targets for f in dataclasses.fields(t)}
    for text in values:
        name, sep, raw = text.partition("=")
        if not sep:
            raise UserError(f"--set {text!r} has no '='; write --set field=value")
        for i, target in enumerate(targets):
            if name in {f.name for f in dataclasses.fields(target)}:
                try:
                    out[i] = dataclasses.replace(out[i], **{name: parse_text(raw, hints[i][name])})
                except UserError:
                    raise
                except ValueError as error:
                    raise UserError(f"--set {name}={raw!r} is not a {hints[i][name]}: {error}") from error
                break
        else:
            raise UserError(
                f"--set {name!r} is not a field of this sweep{nearest(name, names)}; fields: {', '.join(sorted(names))}"
            )
    return out


def parse_text(raw: str, kind: Any) -> Any:
    """The value that a text spells for a field's annotation; raises ValueError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if raw.lower() in ("none", ""):
            return None
        return parse_text(raw, next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        return tuple(parse_text(part.strip(), arguments[0]) for part in raw.split(",") if part.strip())
    if kind is bool:
        if raw.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError("write true or false")
        return raw.lower() in ("true", "1", "yes")
    if kind is int:
        try:
            return int(raw)
        except ValueError:
            try:
                number = Decimal(raw.replace("_", ""))  # 2e6 and 4.0 are whole numbers, exactly, however large
            except ArithmeticError:
                raise ValueError("write a whole number") from None
        if not number.is_finite() or number != number.to_integral_value() or number.adjusted() > _DIGITS:
            raise ValueError(f"write a whole number of at most {_DIGITS} digits")
        return int(number)
    if kind is float:
        value = float(raw)
        if math.isinf(value) and "inf" not in raw.lower():
            raise ValueError("write a number that a float64 holds")
        return value
    if kind is str:
        return raw
    raise ValueError(f"fields of type {kind} cannot be set from the command line")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How to run, settable with `--set`; nothing here changes a result (tests hold this)."""

    cells_per_pack: int = 0  # 0: as many as memory allows and devices can share
    threads: int = 0  # CPU threads a pack; 0: the machine's cores divided among the packs that run at once
    max_retries: int = 2  # of a pack after a crash; bad input is never retried
    checkpoint_seconds: float = 30.0  # between checkpoints of unfinished work
    checkpoint_steps: int = 0  # also a checkpoint every so many steps of a language model; 0: by time alone
    keep_checkpoints: bool = False  # of finished cells, too: a larger budget continues from them
    workers: int = 1  # processes that train one language model together, each with its own GPU or share of the cores
    min_workers: int = 0  # go on with as few, and with more when there is room again; 0: always `workers`
    grace_seconds: float = 25.0  # that running packs get to save when the launch is stopped
    lm_path: str = ""  # local folder with the language model (Hugging Face format) instead of the hub
    weights: str = ""  # local folder of language models that benchmarks/fetch_models.py fetched; or PLUMBLINE_WEIGHTS
    stream_path: str = ""  # local folder with the token shards (same Parquet schema) instead of the hub
    hub_commits: tuple[str, ...] = ()  # owner/name@commit to read from the hub; else what `main` is at the start
    on_corrupt: str = "raise"  # a corrupt shard: "raise" names it and stops, "skip" names it and goes on
    gpu_memory_gb: float = 0.0  # of one GPU; 0: asked of this node's first GPU
    price_per_hour: float = 0.0  # for --plan: money per GPU hour where the machine has GPUs, else per machine hour
    gpu: tuple[str, ...] = ()  # for --plan: GPU types to estimate for, with a price or without: h100-sxm:2.5,l4
    mlflow_artifact_mb: float = 64.0  # larger files stay in the ledger alone; MLflow gets their address
    probe: bool = True  # --plan measures a few steps to calibrate its estimate

    def __post_init__(self) -> None:
        if self.on_corrupt not in ("raise", "skip"):
            raise UserError(f"on_corrupt={self.on_corrupt!r} is not known; choose raise or skip")
        for entry in self.hub_commits:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", entry):
                raise UserError(f"hub_commits={entry!r} names no commit; write owner/name@COMMIT, 40 digits of 0-9 a-f")
        for name in ("cells_per_pack", "threads", "max_retries", "checkpoint_steps", "min_workers"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} is negative; choose 0 or more")
        for name in ("checkpoint_seconds", "grace_seconds", "gpu_memory_gb", "mlflow_artifact_mb", "price_per_hour"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} is not a finite number of 0 or more; choose one")
        if self.workers < 1 or self.min_workers > self.workers:
            raise UserError(
                f"workers={self.workers} with min_workers={self.min_workers}; choose workers >= 1 and min_workers in "
                "0..workers"
            )
        asked_types(self.gpu)
