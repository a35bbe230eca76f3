"""Threads: a torch thread count for one block of code, and numba kernels side by side."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Runs the block with `count` intra-op threads, then restores the caller's count."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pool(n_threads: int) -> ThreadPoolExecutor:
    """Pool of this process shared by all callers (a forked child makes its own)."""
    with _pools_lock:
        key = (os.getpid(), n_threads)
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(n_threads, thread_name_prefix="kernel")
        return _pools[key]


def array(value: Any) -> Any:
    """Numpy view of a tensor (bfloat16 as int16 patterns); anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()


def even_split(size: int, parts: int) -> list[int]:
    """Bounds of `parts` consecutive ranges that cover `size`."""
    return [size * part // parts for part in range(parts + 1)]


def thread_shares(items: int) -> list[int]:
    """Bounds of what each of torch's threads takes of `items`, none of them nothing."""
    return even_split(items, max(1, min(items, torch.get_num_threads())))


def run_kernel(kernel: Callable[..., None], bounds: Sequence[int], *arguments: Any) -> None:
    """kernel(*arguments, start, stop) over consecutive bounds, in a thread each when there are several."""
    arrays = [array(value) for value in arguments]
    spans = [(a, b) for a, b in itertools.pairwise(bounds) if b > a]
    if len(spans) == 1:
        kernel(*arrays, *spans[0])
        return
    for future in [_pool(len(bounds) - 1).submit(kernel, *arrays, a, b) for a, b in spans]:
        future.result()
