"""Precision, chunking and argument checks shared by the sequence operators.

Shapes: B batch, R batch rows processed together, T time, H heads, D any feature width, N chunks, C chunk length,
M matrices of one chunk each.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

CACHED_FLOATS = 2**18  # 1 MiB in float32
IMPLS = ("auto", "recurrent", "chunked")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 as soon as one input is float64, otherwise float32, whatever the storage type."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def no_autocast(x: Tensor) -> torch.autocast:
    """Context in which matrix products keep the precision of their operands, under an outer autocast too."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def row_groups(batch: int, device: torch.device, floats: int) -> Iterable[slice]:
    """Batch rows to process together, `floats` being the numbers of a row that are read at a time.

    On a CPU few rows at a time, one of a large model, keep every temporary in cache and peak memory independent of the
    batch; many rows of a small model save calls. A GPU needs the whole batch to be busy.
    """
    step = max(1, CACHED_FLOATS // max(floats, 1)) if device.type == "cpu" else max(batch, 1)
    return (slice(start, start + step) for start in range(0, batch, step))


def time_spans(T: int, span: int, device: torch.device) -> list[slice]:
    """Pieces of time whose temporaries stay in a CPU's cache; the whole sequence on a GPU."""
    step = span if device.type == "cpu" else T
    return [slice(start, min(start + step, T)) for start in range(0, T, step)]


def to_chunks(x_RTHD: Tensor, chunk: int, dtype: torch.dtype, *, extra: int = 0) -> Tensor:
    """[R, T, H, D] -> contiguous [R*H*N, C, D + extra] in `dtype`.

    Time is padded with zeros to a whole number of chunks; `extra` columns are left for the caller to fill.
    """
    R, T, H, D = x_RTHD.shape
    padded = -(-T // chunk) * chunk
    out = torch.empty(R, H, padded, D + extra, dtype=dtype, device=x_RTHD.device)
    out[:, :, :T, :D].copy_(x_RTHD.transpose(1, 2))
    out[:, :, T:].zero_()
    return out.view(-1, chunk, D + extra)


def from_chunks(x_MCD: Tensor, out_RTHD: Tensor) -> None:
    """Inverse of `to_chunks`, written into `out_RTHD` (which decides T, H and the dtype)."""
    R, T, H, D = out_RTHD.shape
    out_RTHD.copy_(x_MCD.view(R, H, -1, D)[:, :, :T].transpose(1, 2))


def relative_decay(gamma64_MC: Tensor, dtype: torch.dtype) -> Tensor:
    """D_ij = exp(gamma_i - gamma_j) on and below the diagonal, 0 above.

    At -20 a step gamma reaches -640 within a chunk, where float32 resolves 6e-5. Its integer part is exact in
    float32, so integer and fractional parts are subtracted separately and no digit of the difference is lost.
    """
    C = gamma64_MC.shape[1]
    above = torch.full((C, C), -torch.inf, dtype=dtype, device=gamma64_MC.device).triu_(1)
    if dtype == torch.float64:
        difference = gamma64_MC.unsqueeze(2) - gamma64_MC.unsqueeze(1)
    else:
        whole64 = gamma64_MC.round()
        fraction = (gamma64_MC - whole64).to(dtype)
        whole = whole64.to(dtype)
        difference = whole.unsqueeze(2) - whole.unsqueeze(1)
        difference.add_(fraction.unsqueeze(2)).sub_(fraction.unsqueeze(1))
    return difference.add_(above).exp_()


def check_shape(name: str, x: Tensor, expected: tuple[int, ...], legend: str) -> None:
    """Raise ValueError unless `x` has the expected shape; `legend` names its axes."""
    if tuple(x.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {legend} = {expected}; check the layout")


def check_rank(name: str, x: Tensor, legend: str) -> None:
    """Raise ValueError unless `x` has as many axes as `legend`, a list such as [B, T, H, K]."""
    rank = legend.count(",") + 1
    if x.dim() != rank:
        raise ValueError(f"{name} has {x.dim()} axes {tuple(x.shape)}, expected {rank}: {legend}")


def check_impl(impl: str, allowed: tuple[str, ...] = IMPLS) -> None:
    """Raise ValueError for an implementation that the operator does not have."""
    if impl not in allowed:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(allowed)}; choose one of these")
