"""Paired CPU-time ratios: how every speed claim of the project is measured.

Absolute times on a shared machine mean little; the ratio of two arms that ran a moment apart means a lot.
An *arm* is a callable without arguments that does its work once and returns the CPU-seconds it took (user +
system, all threads of its process). `paired` runs the arms in turn, round after round, and forms one ratio
per round.

    results = paired(
        {"peer": timed(peer_step), "ours": timed(our_step)},
        baseline="peer",
        repeats=7,
    )
    targets = {("k = 32", "ours"): 18.0}
    print(markdown_table({"k = 32": results}, baseline="peer", targets=targets))

An arm that needs another environment (allocator settings, thread counts) lives in a process of its own: the
parent holds a `Worker(argv, env)`, the child calls `serve(step)`; it alternates with the other arms like any arm.
"""

from __future__ import annotations

import io
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Arm = Callable[[], float]
READY, GO, STOP = "paired:ready", "paired:go", "paired:stop"
REPLY = "paired:cpu="


def timed(work: Callable[[], object]) -> Arm:
    """Arm that runs `work` in this process and returns its CPU-seconds (`time.process_time`)."""

    def arm() -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    return arm


class Worker:
    """Arm in a process of its own, started with `argv` (after the interpreter) and extra environment `env`.

    The child must call `serve`. Use as a context manager, so that the child ends with the benchmark.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *argv],
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        self._wait_for(READY)

    def _wait_for(self, prefix: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(prefix):
                return line.strip()
        raise RuntimeError(f"benchmark worker ended with exit code {self._process.wait()}; see its stderr above")

    def _send(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def __call__(self) -> float:
        self._send(GO)
        return float(self._wait_for(REPLY).removeprefix(REPLY))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._send(STOP)
            self._process.communicate(timeout=60)


def serve(work: Callable[[], object]) -> None:
    """Child side of `Worker`: runs `work` once for each request and answers with its CPU-seconds."""
    arm = timed(work)
    print(READY, flush=True)
    for line in sys.stdin:
        if line.strip() != GO:
            return
        print(f"{REPLY}{arm()!r}", flush=True)


@dataclass(frozen=True, kw_only=True)
class Paired:
    """One arm against the baseline: CPU-seconds of both, round by round."""

    name: str
    baseline_s: tuple[float, ...]
    arm_s: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Baseline over arm, one per round: above 1 means that the arm is cheaper."""
        return tuple(b / max(a, 1e-9) for b, a in zip(self.baseline_s, self.arm_s, strict=True))

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def seconds(self) -> float:
        """Median CPU-seconds of the arm."""
        return statistics.median(self.arm_s)


def paired(
    arms: Mapping[str, Arm],
    *,
    baseline: str,
    repeats: int = 5,
    warmup: int = 1,
    progress: Callable[[str], object] | None = None,
) -> dict[str, Paired]:
    """Run all arms in turn `warmup + repeats` times; returns every arm (baseline too) against `baseline`.

    The order is reversed each round, so that a slow drift of the machine favours no arm. Raises ValueError
    when the baseline is not an arm or `repeats` is not positive.
    """
    if baseline not in arms:
        raise ValueError(f"baseline={baseline!r} is not an arm; choose one of {sorted(arms)}")
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(-warmup, repeats):
        names = list(arms) if turn % 2 == 0 else list(arms)[::-1]
        for name in names:
            seconds = arms[name]()
            if turn >= 0:
                taken[name].append(seconds)
            if progress is not None:
                progress(f"round {turn + 1}/{repeats}{' (warm-up)' if turn < 0 else ''} {name}: {seconds:.3f} s")
    return {
        name: Paired(name=name, baseline_s=tuple(taken[baseline]), arm_s=tuple(seconds))
        for name, seconds in taken.items()
    }


def rebase(results: Mapping[str, Paired], baseline: str) -> dict[str, Paired]:
    """The same rounds against another arm: ratios to `baseline` instead of the one they were measured with."""
    base_s = results[baseline].arm_s
    return {name: Paired(name=name, baseline_s=base_s, arm_s=arm.arm_s) for name, arm in results.items()}


def markdown_table(
    results: Mapping[str, Mapping[str, Paired]],
    *,
    baseline: str,
    targets: Mapping[tuple[str, str], float] | None = None,
) -> str:
    """Markdown table of `{case: paired(...)}`: median CPU-seconds, median ratio [min, max], target met or not.

    `targets` maps (case, arm) to the least ratio wanted.
    """
    targets = targets or {}
    lines = [
        f"| case | arm | CPU-seconds (median) | ratio to {baseline} (median [min, max]) | target | met |",
        "|---|---|---|---|---|---|",
    ]
    for case, arms in results.items():
        for name, arm in arms.items():
            target = targets.get((case, name))
            low, high = min(arm.ratios), max(arm.ratios)
            ratio = "1" if name == baseline else f"{arm.ratio:.2f} [{low:.2f}, {high:.2f}]"
            met = "" if target is None else ("yes" if arm.ratio >= target else "**no**")
            wanted = "" if target is None else f"≥ {target:g}"
            lines.append(f"| {case} | {name} | {arm.seconds:.4f} | {ratio} | {wanted} | {met} |")
    return "\n".join(lines)


def cpuinfo() -> dict[str, str]:
    """What Linux says of the last core, by name ("model name", "flags"); at least the model's name elsewhere."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    known = dict(re.findall(r"^(.+?)\s*: (.+)$", text, re.MULTILINE))
    return {"model name": platform.processor() or platform.machine(), **known}


def machine() -> str:
    """One line about this machine: CPU model, cores that this process may use, memory, Python and torch."""
    cpu = cpuinfo()["model name"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [cpu, f"{cores} cores", f"{gib:.0f} GiB", f"Python {platform.python_version()}"]
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        parts.append(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    load = os.getloadavg()[0]
    parts.append(f"load {load:.1f} at the time")
    return ", ".join(parts)


def write_report(text: str, out: str | Path | None) -> None:
    """Print `text`; with `out`, write it there as well (folders are made)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # × and ± on a terminal that has none
    print(text)
    if out is not None:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
