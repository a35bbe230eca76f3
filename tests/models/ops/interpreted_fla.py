"""flash-linear-attention's kernels in Triton's interpreter, on a CPU: the fused path as a candidate for the preflight.

Import in a process of its own that has TRITON_INTERPRET=1. Two things must be arranged before it can run: each
autotuner keeps one configuration (measuring them in the interpreter takes hours), and loop counters become Triton
scalars, as they are in compiled code (the interpreter hands out Python integers, which have no `.to`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from triton.runtime import autotuner
from triton.runtime.interpreter import interpreter_semantic

LOOPING_MODULES = ("fla.ops.common.chunk_delta_h",)
_autotuner_init = autotuner.Autotuner.__init__


def _keep_one_config(self: Any, fn: Any, arg_names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
    _autotuner_init(self, fn, arg_names, list(configs)[:1], *args, **kwargs)


def _scalar_range(*bounds: Any) -> Iterator[Any]:
    return (interpreter_semantic.to_tensor(i) for i in range(*(int(bound) for bound in bounds)))


autotuner.Autotuner.__init__ = _keep_one_config

from models.ops.delta_rule import fused_gated_delta  # noqa: E402

for name in LOOPING_MODULES:
    vars(importlib.import_module(name))["range"] = _scalar_range


def fused(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The product's own call of flash-linear-attention."""
    return fused_gated_delta(q, k, v, g, beta, initial_state, scale)
