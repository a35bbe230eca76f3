"""Weights as one-token steps read them fastest, for as long as a sample takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def decoding_weights(model: nn.Module) -> Iterator[None]:
    """Projections of `model` in the autocast region's precision and, on a CPU, laid out by columns.

    A step multiplies each matrix with one vector a sample and waits for memory. By columns the product streams
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
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        weight = weight.to(torch.get_autocast_dtype(kind))
    if kind != "cpu":
        return weight
    rows = weight.reshape(-1, weight.shape[-1])
    return rows.t().contiguous().t().view(weight.shape)
