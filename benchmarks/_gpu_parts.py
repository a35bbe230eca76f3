"""What the parts of `gpu.py` share: the plan of a run, the record that survives a crash, and timing."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Number = float | int | str | None


@dataclass(frozen=True)
class Plan:
    """Where a part runs. tiny: the smallest sizes, as a test on a CPU. until: the part's end by `time.monotonic`."""

    device: torch.device
    tiny: bool
    until: float

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until the part's end."""
        return self.until - time.monotonic()


class Record:
    """Rows, gates and notes of one part, written to a file with each addition: a crash keeps what came before."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, Number]] = []
        self.gates: list[dict[str, Number | bool]] = []
        self.notes: list[str] = []

    def row(self, case: str, **numbers: Number) -> None:
        """Numbers measured for one case, by the name of their column; None: not measured here."""
        self.rows.append({"case": case, **{name.replace("_", " "): _plain(value) for name, value in numbers.items()}})
        self._write()

    def gate(self, name: str, value: float, limit: float) -> None:
        """A condition that must hold: value at most limit (NaN does not pass)."""
        self.gates.append({"gate": name, "value": _plain(value), "limit": limit, "passed": bool(value <= limit)})
        self._write()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        partial = self.path.with_suffix(".partial")
        found = {"rows": self.rows, "gates": self.gates, "notes": self.notes}
        partial.write_text(json.dumps(found, default=str, allow_nan=False), encoding="utf-8")
        os.replace(partial, self.path)


def _plain(value: Number) -> Number:
    """NaN and infinities as text, which JSON has no numbers for."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def wait(device: torch.device) -> None:
    """Return when the device has done what it was sent."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Callable[[], object], plan: Plan, *, calls: int = 10, rounds: int = 3) -> float:
    """Median over rounds of the time of one call, after a first one that compiles; on a GPU calls overlap."""
    work()
    wait(plan.device)
    calls, rounds = (1, 1) if plan.tiny else (calls, rounds)
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        wait(plan.device)
        taken.append((time.perf_counter() - start) / calls)
        if plan.left() < 0:
            break
    return 1e3 * statistics.median(taken)


def peak_gib(work: Callable[[], object], plan: Plan) -> float | None:
    """GiB that the device holds at most during a call, all that was there before included; None on a CPU."""
    if not plan.on_gpu:
        return None
    wait(plan.device)
    torch.cuda.reset_peak_memory_stats(plan.device)
    work()
    wait(plan.device)
    return torch.cuda.max_memory_allocated(plan.device) / 2**30


def host_waits(work: Callable[[], object], plan: Plan) -> int | None:
    """How often a call makes the host wait for the GPU, as PyTorch counts it; None on a CPU."""
    if not plan.on_gpu:
        return None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def relative_rms(x: Tensor, reference: Tensor) -> float:
    """RMS of the difference over RMS of the reference; NaN where x is not finite."""
    reference = reference.double()
    scale = reference.square().mean()
    return float(((x.double() - reference).square().mean() / scale).sqrt()) if bool(scale > 0) else math.nan


def forward_backward(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], weights: Tensor
) -> tuple[Tensor, ...]:
    """The function's output and the gradients of its inputs for a loss that is linear in the output."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)[0]
    return (out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype)))
