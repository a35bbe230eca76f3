"""Every CUDA path on one GPU, in one command and at most eight minutes: equality gates, time and memory.

    python benchmarks/gpu.py --out gpu.json      # writes gpu.json and gpu.md
    python benchmarks/gpu.py --cpu --out cpu.json  # the same parts at the smallest sizes, to see that they run

Needs this working tree, Python 3.11 or 3.12, and torch (2.8 or later), triton, numpy, numba and transformers; with
flash-linear-attention and mamba-ssm their kernels are tested, too. No network and no data: weights and tokens are
random. Each part runs in a process of its own with its own seconds, so that a crash or a hang costs that part alone,
and what it had measured until then is kept.

Exit code: 0 when every gate holds; 1 when one fails or a part does not end; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# name -> (function of (plan, record), seconds): together at most eight minutes
PARTS: dict[str, tuple[str, float]] = {
    "machine": ("benchmarks._gpu_kernels:machine", 20),
    "delta_speech": ("benchmarks._gpu_kernels:delta_speech", 75),
    "delta_music": ("benchmarks._gpu_kernels:delta_music", 75),
    "sae": ("benchmarks._gpu_sae:sae", 90),
    "host": ("benchmarks._gpu_models:host", 35),
    "speech_chunked": ("benchmarks._gpu_models:speech_chunked", 35),
    "speech_fused": ("benchmarks._gpu_models:speech_fused", 35),
    "music_chunked": ("benchmarks._gpu_models:music_chunked", 35),
    "music_fused": ("benchmarks._gpu_models:music_fused", 35),
    "mamba": ("benchmarks._gpu_kernels:mamba", 25),
    "sample": ("benchmarks._gpu_models:sample", 20),
}
GRACE_S = 5.0  # between the request to end and the kill; processes that a part started end with it
CPU_SECONDS = 600.0
LOG_LINES = 15


@dataclass(frozen=True)
class Outcome:
    """How a part ended, and the rows, gates and notes that it had written."""

    status: str
    seconds: float
    found: Mapping[str, Any]
    log: Sequence[str] = ()

    @property
    def failed(self) -> bool:
        return self.status != "ended" or not all(gate["passed"] for gate in self.found.get("gates", []))


def run_part(command: Sequence[str], result: Path, seconds: float, env: Mapping[str, str] | None = None) -> Outcome:
    """Run a part that writes `result`; after `seconds` it is asked to end, then killed with what it started."""
    log = result.with_suffix(".log")
    start = time.monotonic()
    with log.open("wb") as sink:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        try:
            code = child.wait(seconds)
            status = "ended" if code == 0 else _describe(code)
        except subprocess.TimeoutExpired:
            status = f"not ended within {seconds:g} s"
            child.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    lines = [] if status == "ended" else log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return Outcome(status, time.monotonic() - start, found, lines)


def _describe(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def seconds_of(name: str, *, cpu: bool) -> float:
    """Seconds that a part has; a busy CPU has all that it needs."""
    return CPU_SECONDS if cpu else PARTS[name][1]


def run_all(names: Sequence[str], *, cpu: bool, threads: int | None) -> dict[str, Outcome]:
    """Every part in turn, in a folder of their own that also keeps the preflights' verdicts."""
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        env = {"PLUMBLINE_CACHE": folder, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if threads is not None:
            env["OMP_NUM_THREADS"] = str(threads)
        for name in names:
            result = Path(folder) / f"{name}.json"
            command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--result", str(result)]
            seconds = seconds_of(name, cpu=cpu)
            print(f"{name}: at most {seconds:g} s", file=sys.stderr, flush=True)
            outcomes[name] = run_part([*command, *(["--cpu"] if cpu else [])], result, seconds, env)
            print(f"{name}: {outcomes[name].status}, {outcomes[name].seconds:.0f} s", file=sys.stderr, flush=True)
    return outcomes


def run_here(name: str, result: Path, *, cpu: bool) -> None:
    """The body of a part's process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what the part started is ended by it
    import torch

    from benchmarks._gpu_parts import Plan, Record

    module, _, attribute = PARTS[name][0].partition(":")
    device = torch.device("cpu" if cpu else "cuda")
    plan = Plan(device, tiny=cpu, until=time.monotonic() + seconds_of(name, cpu=cpu) - GRACE_S)
    getattr(importlib.import_module(module), attribute)(plan, Record(result))


def markdown(outcomes: Mapping[str, Outcome], *, cpu: bool) -> str:
    """The results as tables: gates first, then a table of numbers per part."""
    lines = ["# GPU", ""]
    if cpu:
        lines += ["On a CPU, at the smallest sizes: that the parts run, not how fast.", ""]
    for outcome in outcomes.values():
        lines += [f"- {note}" for note in outcome.found.get("notes", [])]
    lines += ["", "| part | gate | value | limit | holds |", "|---|---|---|---|---|"]
    for name, outcome in outcomes.items():
        if outcome.status != "ended":
            lines.append(f"| {name} | the part ends | {outcome.status} | {outcome.seconds:.0f} s | **no** |")
        for gate in outcome.found.get("gates", []):
            holds = "yes" if gate["passed"] else "**no**"
            lines.append(f"| {name} | {gate['gate']} | {_cell(gate['value'])} | {_cell(gate['limit'])} | {holds} |")
    for name, outcome in outcomes.items():
        rows = outcome.found.get("rows", [])
        if rows:
            lines += ["", f"## {name}", "", *_table(rows)]
        if outcome.log:
            lines += ["", f"## {name}: last lines of its output", "", "```", *outcome.log, "```"]
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    body = [f"| {' | '.join(_cell(row.get(name)) for name in columns)} |" for row in rows]
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *body]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    text = f"{value:,.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file; the tables go next to it as .md")
    parser.add_argument("--cpu", action="store_true", help="the same parts at the smallest sizes on the CPU")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of the parts")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run_here(args.part, args.result, cpu=args.cpu)
        return 0
    if not args.cpu:
        import torch

        if not torch.cuda.is_available():
            print(
                "no CUDA device is visible; choose a machine with one, or --cpu for the smallest sizes", file=sys.stderr
            )
            return 2
    outcomes = run_all(args.only, cpu=args.cpu, threads=args.threads)
    text = markdown(outcomes, cpu=args.cpu)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        parts = {
            name: {"status": o.status, "seconds": o.seconds, "failed": o.failed, **o.found, "log": list(o.log)}
            for name, o in outcomes.items()
        }
        args.out.write_text(json.dumps({"cpu": args.cpu, "parts": parts}, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return int(any(outcome.failed for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
