"""Is a fused kernel right on this machine? Asked once, in a process that may crash or hang.

Fused kernels have been silently wrong on real stacks (right outputs, wrong gradients of beta and g), so a GPU model,
driver and compiler combination is trusted only after outputs and gradients have agreed with the float64 reference.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from models.ops._preflight_cases import Case, KernelCase, ScanCase

TIMEOUT_S = 600.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Outcome of a preflight.

    `reason` says in words why the kernel is not trusted ("" when it is); `errors` holds the relative RMS errors by
    trial and result; `transient` marks a failure that says nothing about the kernel (no memory left) and is not
    kept on disk.
    """

    trusted: bool
    reason: str
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    transient: bool = False


def run_preflight(
    case: KernelCase,
    *,
    candidate: str | None = None,
    timeout_s: float = TIMEOUT_S,
    search_path: Sequence[str | Path] = (),
) -> Verdict:
    """Compare a kernel with the reference in a subprocess and judge what comes back.

    Args:
        case: operator, shape, dtype and device to test.
        candidate: "package.module:function" with the signature of the case's fused kernel, which it is when None.
        timeout_s: seconds after which the process and all its children are killed.
        search_path: folders in which the candidate's module may be found in addition to the usual ones.

    Returns:
        The verdict: trusted only if every output and gradient was finite and within the tolerance in every trial.
    """
    asked = {"operator": case.operator, "case": asdict(case), "candidate": candidate or case.fused}
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *map(str, search_path), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory(prefix="preflight-") as folder:
        request, result, stderr = (Path(folder) / name for name in ("request.json", "result.json", "stderr"))
        request.write_text(json.dumps(asked), encoding="utf-8")
        with stderr.open("wb") as sink:
            child = subprocess.Popen(
                [sys.executable, "-m", "models.ops._preflight_check", str(request), str(result)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=sink,
                start_new_session=True,
            )
            try:
                code = child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return Verdict(trusted=False, reason=f"no answer within {timeout_s:g} s; the process was killed")
            finally:
                _kill_session(child)
        if code != 0 or not result.exists():
            return Verdict(trusted=False, reason=f"{_describe_exit(code)}: {_last_line(stderr)}")
        found = json.loads(result.read_text(encoding="utf-8"))
    failure = found["failure"]
    return Verdict(
        trusted=failure is None,
        reason=failure or "",
        errors=found["errors"],
        transient=found.get("transient", False),
    )


def preflight(
    case: KernelCase,
    *,
    candidate: str | None = None,
    timeout_s: float = TIMEOUT_S,
    search_path: Sequence[str | Path] = (),
    cache_dir: Path | None = None,
) -> Verdict:
    """`run_preflight` with its verdict kept on disk, and logged when the kernel is not trusted.

    A verdict holds for one GPU model, driver, torch, Triton, package of kernels, dtype and family of shapes
    (`shape_family`). `cache_dir` defaults to plumbline/preflight in the user's cache folder; delete a file there to
    test again.
    """
    key = stack_fingerprint(case.device) | shape_family(case) | {"candidate": candidate or case.fused}
    key |= {"tolerance": case.tolerance, "trials": [trial.name for trial in case.trials]}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = (cache_dir or default_cache_dir()) / f"{digest}.json"
    verdict = _read(path, key)
    if verdict is None:
        verdict = run_preflight(case, candidate=candidate, timeout_s=timeout_s, search_path=search_path)
        if not verdict.transient:
            _write(path, {"key": key, "tested": asdict(case), "verdict": asdict(verdict)})
    if verdict.trusted:
        log.info("fused %s trusted at %s (%s)", case.operator, case, path)
    else:
        kept = "not kept, the next process tests again" if verdict.transient else f"kept in {path}"
        log.warning("fused %s not used at %s, chunked instead: %s (%s)", case.operator, case, verdict.reason, kept)
    return verdict


def fused_is_trusted(k_shape: Sequence[int], v_shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether "auto" may use the fused kernel for keys [B, T, h, K] and values [B, T, H, V]."""
    B, T, h, K = k_shape
    H, V = v_shape[2:]
    name = str(dtype).removeprefix("torch.")
    return _is_trusted(Case(B=B, T=T, h=h, H=H, K=K, V=V, dtype=name, device=str(device)))


def scan_is_trusted(x_shape: Sequence[int], states: int, device: torch.device) -> bool:
    """Whether "auto" may use the fused selective scan for inputs [B, T, D] and N states per channel."""
    B, T, D = x_shape
    return _is_trusted(ScanCase(B=B, T=T, D=D, N=states, dtype="float32", device=str(device)))


def _is_trusted(case: KernelCase) -> bool:
    family = tuple(sorted(shape_family(case).items()))
    if family not in _trusted:
        _trusted[family] = preflight(case).trusted
    return _trusted[family]


_trusted: dict[tuple[tuple[str, object], ...], bool] = {}


def shape_family(case: KernelCase) -> dict[str, object]:
    """The shapes that one verdict covers: equal heads and widths, lengths and batches up to the next power of two.

    Trimmed batches have hundreds of lengths, but the compiled kernels differ only in whether the length is a
    multiple of 16 and whether the last chunk of 64 is full, so these are kept apart.
    """
    alignment = next(step for step in (64, 16, 1) if case.T % step == 0)
    return {
        "dtype": case.dtype,
        "device": torch.device(case.device).type,
        **case.shape_constants(),
        "alignment": alignment,
        "length_up_to": 1 << (case.T - 1).bit_length(),
        "batch_up_to": 1 << (case.B - 1).bit_length(),
    }


def stack_fingerprint(device: str) -> dict[str, object]:
    """Everything except the shape that can change a compiled kernel."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device
    return {
        "gpu": gpu,
        "driver": _driver_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fla": _version("flash-linear-attention"),
        "mamba_ssm": _version("mamba-ssm"),
    }


def default_cache_dir() -> Path:
    """preflight under $PLUMBLINE_CACHE, else under plumbline in $XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("PLUMBLINE_CACHE"):
        return Path(named) / "preflight"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plumbline" / "preflight"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def _driver_version() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no nvidia-smi"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60, check=False)
    return answer.stdout.strip().splitlines()[0] if answer.returncode == 0 and answer.stdout.strip() else "unknown"


def _kill_session(child: subprocess.Popen[bytes]) -> None:
    """End the child and whatever it started (compilers); it leads its own session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _describe_exit(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}" if code else "ended without an answer"


def _last_line(stderr: Path) -> str:
    lines = [line for line in stderr.read_text(errors="replace", encoding="utf-8").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "nothing on stderr"


def _read(path: Path, key: dict[str, object]) -> Verdict | None:
    """Verdict on disk, or None when there is none, it is damaged or it answers another question."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Verdict(**record["verdict"]) if record["key"] == json.loads(json.dumps(key)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, record: dict[str, object]) -> None:
    """Atomic, so that processes of one job can test at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(record, file, indent=1)
    os.replace(file.name, path)
