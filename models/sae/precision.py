"""In which precision this processor multiplies fastest: measured once per process, not read from its flags.

Flags say which instructions exist, not how fast they are: where int8 and bfloat16 both have some, bfloat16 took half
the time of int8 on one processor (AMX) and twice the time on others. Results do not depend on the choice: whatever the
screen's precision, float32 settles what it finds.

Shapes: R rows, D width in, M features.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch

from models.cpu import int8

ROWS, WIDTH, FEATURES, RUNS = 256, 512, 2048, 3
HOPELESS = 2.0  # times float32's seconds, after which a precision is not measured again
# times float32's seconds that a low precision may take, as its candidates are scored again; and times int8's that
# bfloat16 may take, whose candidates are fewer, so that a tie is always settled in the same way
LOW_SHARE, BFLOAT16_SHARE = 0.8, 0.9


def product_seconds(dtype: torch.dtype, limit: float = float("inf")) -> float:
    """CPU-seconds of one screening product [R, D] × [D, M] in a precision (int8, bfloat16 or float32): the least of a
    few runs after a small one that compiles, or of one that took more than `limit`. Of the two ways to multiply int8,
    those of the faster."""
    if dtype != torch.int8:
        return _seconds(dtype, limit, torch.mm)
    of_torch, paired = _int8_seconds(limit)
    return min(of_torch, paired)


def _int8_seconds(limit: float) -> tuple[float, float]:
    """CPU-seconds of torch's int8 product and of ours, infinite where the processor lacks the instruction."""
    paired = _seconds(torch.int8, limit, _paired) if int8.pairs_int8() else float("inf")
    return _seconds(torch.int8, min(limit, HOPELESS * paired), torch._int_mm), paired


def _paired(x_RD: torch.Tensor, W_DM: torch.Tensor) -> torch.Tensor:
    width, features = W_DM.shape
    panels = int8.pack(W_DM.T, torch.empty(int8.packed_shape(features, width), dtype=torch.int16))
    return int8.multiply(x_RD, panels, torch.empty(len(x_RD), features, dtype=torch.int32))


def _seconds(dtype: torch.dtype, limit: float, multiply: Callable[[torch.Tensor, torch.Tensor], object]) -> float:
    generator = torch.Generator().manual_seed(0)
    x, W = ((40 * torch.randn(n, WIDTH, generator=generator)).clamp_(-127, 127).to(dtype) for n in (ROWS, FEATURES))
    multiply(x[:32], W.T)
    least = float("inf")
    for _ in range(RUNS):
        start = time.process_time()
        multiply(x, W.T)
        least = min(least, time.process_time() - start)
        if least > limit:
            break
    return least


Seconds = Callable[[torch.dtype, float], float]


def choose(seconds: Seconds = product_seconds) -> torch.dtype:
    """int8, bfloat16 or float32: the fastest by `seconds`; bfloat16 must beat int8 clearly, and a low one float32."""
    float32 = seconds(torch.float32, float("inf"))
    int8, bfloat16 = (seconds(dtype, HOPELESS * float32) for dtype in (torch.int8, torch.bfloat16))
    low, taken = (torch.bfloat16, bfloat16) if bfloat16 < BFLOAT16_SHARE * int8 else (torch.int8, int8)
    return low if taken < LOW_SHARE * float32 else torch.float32


@lru_cache(maxsize=1)
def screen_precision() -> torch.dtype:
    """What the screen of the numba engine begins with on this processor."""
    return choose()


@lru_cache(maxsize=1)
def multiplies_pairs() -> bool:
    """Whether our int8 product takes less time than torch's on this processor."""
    of_torch, paired = _int8_seconds(float("inf"))
    return paired < of_torch


@lru_cache(maxsize=1)
def bfloat16_is_faster() -> bool:
    """Whether a bfloat16 product takes clearly less time than a float32 one on this processor."""
    float32 = product_seconds(torch.float32)
    return product_seconds(torch.bfloat16, HOPELESS * float32) < LOW_SHARE * float32
