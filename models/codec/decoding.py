"""Decoding token by token, by compiled kernels on a CPU or by the model's own operations anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from models.codec.model import CodecLM
from models.codec.text import Texts
from models.cpu.threads import torch_threads

Backend = Literal["auto", "numba", "torch"]
BACKENDS: tuple[Backend, ...] = ("auto", "numba", "torch")
Step = Callable[[Tensor], Tensor]


def decoding_backend(model: CodecLM, backend: Backend = "auto") -> Literal["numba", "torch"]:
    """What will take the steps: "auto" is numba where it can be.

    Raises ValueError for an unknown backend, and for numba with a reason why it cannot be.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}; choose one of these")
    if backend == "torch":
        return "torch"
    reason = _why_not_compiled(model)
    if reason is None:
        return "numba"
    if backend == "numba":
        raise ValueError(f"backend='numba' {reason}; choose 'auto' or 'torch'")
    return "torch"


def _why_not_compiled(model: CodecLM) -> str | None:
    device, dtypes = model.heads.device.type, {p.dtype for p in model.parameters()}
    if device != "cpu":
        return f"runs on CPUs, but the model is on {device}"
    if dtypes != {torch.float32}:
        return f"needs float32 parameters, but some are {', '.join(sorted(str(d) for d in dtypes - {torch.float32}))}"
    if _weights_dtype("cpu") not in (torch.float32, torch.bfloat16):
        return f"computes with weights in float32 or bfloat16, but autocast wants {_weights_dtype('cpu')}"
    return None


def _weights_dtype(device: str) -> torch.dtype:
    """Precision of float32 projections in the autocast region around the call."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


@contextmanager
def decoding(
    model: CodecLM, tokens_BKT: Tensor, max_steps: int, backend: Backend = "auto", texts: Texts | None = None
) -> Iterator[tuple[Tensor, Step]]:
    """Read T >= 1 columns at once: logits [B, K, V] for the next, and step(tokens [B, K]) -> logits [B, K, V].

    max_steps: columns that can be read in all. The logits of a step are valid until the next one. In an autocast
    region projections have its precision. The model must not change inside the block. texts: as in `CodecLM.text_keys`.

    Raises ValueError as `decoding_backend` and `text_keys` do, and when T exceeds max_steps.
    """
    if decoding_backend(model, backend) == "torch":
        with decoding_weights(model):
            logits, state = model.prefill(tokens_BKT, max_steps, texts)
            yield logits, lambda tokens_BK: model.step(tokens_BK, state)[0]
        return
    from models.codec.compiled.step import CompiledStep  # numba takes a second to import

    logits, state = model.prefill(tokens_BKT, max_steps, texts)
    step = CompiledStep(model, state, len(tokens_BKT), _weights_dtype("cpu"))
    if len(step.torch_parts):
        with decoding_weights(step.torch_parts):
            yield logits, step
        return
    with torch_threads(1):  # the small operations of a draw gain nothing, and threads that wait for the next one spin
        yield logits, step


@contextmanager
def decoding_weights(model: nn.Module) -> Iterator[None]:
    """Projections of `model` in the autocast region's precision and, on a CPU, laid out by columns.

    A step multiplies each matrix with one vector per sample and waits for memory. By columns the product streams
    through it at twice the speed, and the cast that autocast would make anew each step is made once. Values are
    those that the model would use anyway; the old weights are back afterwards.
    """
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    if isinstance(heads := getattr(model, "heads", None), nn.Parameter):
        matrices.append(heads)
    kept = [p.data for p in matrices]
    try:
        with torch.inference_mode(False), torch.no_grad():
            for p in matrices:
                p.data = _prepared(p.data)
        yield
    finally:
        for p, data in zip(matrices, kept, strict=True):
            p.data = data


def _prepared(weight: Tensor) -> Tensor:
    kind = weight.device.type
    if weight.dtype == torch.float32:
        weight = weight.to(_weights_dtype(kind))
    if kind != "cpu":
        return weight
    rows = weight.reshape(-1, weight.shape[-1])
    return rows.t().contiguous().t().view(weight.shape)
