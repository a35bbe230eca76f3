"""Parts of `gpu.py`: the machine, the fused Gated DeltaNet and its preflight, the scans of the Mambas."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks._gpu_parts import Plan, Record, forward_backward, milliseconds, peak_gib, relative_rms
from models.codec.presets import MUSIC, SPEECH
from models.ops import gated_delta, selective_scan, ssd
from models.ops._mamba1_fused import serves
from models.ops._preflight_cases import Case, KernelCase, ScanCase
from models.ops.preflight import preflight, stack_fingerprint

LIBRARIES = ("torch", "triton", "numpy", "numba", "transformers", "flash-linear-attention", "mamba-ssm")
SPEECH_BATCH, MUSIC_BATCH = 24, 8  # clips whose activations are held at once: sweeps' speech_a100 and music_a100
EXACT = 1e-4  # relative RMS error of float32 operators, values and gradients, compared with float64


def machine(plan: Plan, record: Record) -> None:
    """What this ran on, and the two ceilings of a GPU: bfloat16 products and copies in its memory."""
    facts: dict[str, object] = dict(stack_fingerprint(str(plan.device)))
    record.note(
        f"{facts['gpu']}, driver {facts['driver']}, CUDA {torch.version.cuda}, Python {platform.python_version()}"
    )
    record.note(", ".join(f"{name} {_version(name)}" for name in LIBRARIES))
    size = 256 if plan.tiny else 8192
    a, b = (torch.randn(size, size, device=plan.device, dtype=torch.bfloat16) for _ in range(2))
    product_ms = milliseconds(lambda: a @ b, plan)
    copy = torch.empty_like(a.repeat(1 if plan.tiny else 32, 1))
    copy_ms = milliseconds(copy.clone, plan)
    record.row(
        "ceilings",
        bf16_TFLOP_per_s=2 * size**3 / product_ms / 1e9,
        copy_GB_per_s=2 * copy.nbytes / copy_ms / 1e6,
        memory_GiB=torch.cuda.get_device_properties(plan.device).total_memory / 2**30 if plan.on_gpu else None,
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def delta_case(scale: str, plan: Plan) -> Case:
    """The gated delta rule at the shape of a preset's training batch."""
    config, batch = (SPEECH, SPEECH_BATCH) if scale == "speech" else (MUSIC, MUSIC_BATCH)
    heads, device = config.n_heads, str(plan.device)
    width = config.d_model // heads
    K, V = (config.head_k, config.head_v) if config.mixer == "gated_delta" else (width, width)
    if plan.tiny:
        return Case(B=1, T=40, h=2, H=2, K=8, V=16, dtype="bfloat16", device=device)
    return Case(B=batch, T=config.context, h=heads, H=heads, K=K, V=V, dtype="bfloat16", device=device)


def delta_speech(plan: Plan, record: Record) -> None:
    """Gated DeltaNet at the shapes of the speech preset."""
    _delta_part("speech", plan, record)


def delta_music(plan: Plan, record: Record) -> None:
    """Gated DeltaNet at the shapes of the music preset."""
    _delta_part("music", plan, record)


def _delta_part(scale: str, plan: Plan, record: Record) -> None:
    """Verdict of the preflight; fused, chunked and recurrent."""
    case = delta_case(scale, plan)
    _against_recurrent(record, f"{scale}: chunked gated delta rule", replace(case, B=1, T=70, dtype="float32"), _delta)
    fused = _trusted(record, scale, case, plan)
    inputs = case.draw(case.trials[0])
    for impl, T in (("fused", case.T), ("chunked", case.T), ("recurrent", min(case.T, 64))):
        if impl != "fused" or fused:
            _time(record, f"{scale}: gated delta rule, {impl}", functools.partial(_delta, impl), inputs, T, plan)


def mamba(plan: Plan, record: Record) -> None:
    """The scans of Mamba-1 and Mamba-2 at the speech scale, and whether mamba-ssm takes Mamba-1's."""
    inner, states, batch, T = 2 * SPEECH.d_model, SPEECH.d_state, SPEECH_BATCH, SPEECH.context
    if plan.tiny:
        inner, states, batch, T = 32, 4, 1, 40
    case = ScanCase(B=batch, T=T, D=inner, N=states, dtype="float32", device=str(plan.device))
    _against_recurrent(record, "Mamba-1: chunked scan", replace(case, B=1, T=70), _scan)
    fused = serves(states) and _trusted(record, "Mamba-1", case, plan)
    if not serves(states):
        record.note("mamba-ssm is not installed: Mamba-1 takes the chunked scan")
    inputs = case.draw(case.trials[0])
    for impl, length in (("fused", T), ("chunked", T), ("recurrent", min(T, 64))):
        if impl != "fused" or fused:
            _time(record, f"Mamba-1: scan, {impl}", functools.partial(_scan, impl), inputs, length, plan)
    heads = max(1, inner // SPEECH.mamba2_head)
    gen = torch.Generator().manual_seed(0)
    shapes = [(batch, T, heads, inner // heads), (batch, T, heads), (heads,), *2 * [(batch, T, 1, states)]]
    x, dt, A, B, C = (torch.randn(*shape, generator=gen).to(plan.device) for shape in shapes)
    inputs = [x, torch.nn.functional.softplus(dt - 3), -1 - A.abs(), B, C, torch.randn_like(x)]
    short = [z[:1, :70] if z.dim() > 1 else z for z in inputs]
    _compare(record, "Mamba-2: chunked scan", _ssd, short)
    for impl, length in (("chunked", T), ("recurrent", min(T, 64))):
        _time(record, f"Mamba-2: scan, {impl}", functools.partial(_ssd, impl), inputs, length, plan)


def _delta(impl: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    return gated_delta(*inputs, impl=impl)


def _scan(impl: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    return selective_scan(*inputs, impl=impl)


def _ssd(impl: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    return ssd(*inputs, impl=impl)


Operator = Callable[..., tuple[Tensor, Tensor]]


def _against_recurrent(record: Record, name: str, case: KernelCase, operator: Operator) -> None:
    for trial in case.trials:
        _compare(record, f"{name}, {trial.name}", operator, case.draw(trial))


def _compare(record: Record, name: str, operator: Operator, drawn: list[Tensor]) -> None:
    """Gate: the chunked operator in float32 compared with the recurrence in float64, output and all gradients."""
    *inputs, weights = drawn
    expected = forward_backward(functools.partial(operator, "recurrent"), [x.double() for x in inputs], weights)
    actual = forward_backward(functools.partial(operator, "chunked"), inputs, weights)
    worst = max(relative_rms(x, y) for x, y in zip(actual, expected, strict=True))
    record.gate(f"{name}: error compared with float64", worst, EXACT)


def _trusted(record: Record, name: str, case: KernelCase, plan: Plan) -> bool:
    """The product's own verdict, kept where the training parts find it; off a GPU there is nothing to ask."""
    if not plan.on_gpu:
        record.note(f"{name}: fused kernels need CUDA")
        return False
    verdict = preflight(case, timeout_s=max(20.0, plan.left() - 30))
    worst = max((error for errors in verdict.errors.values() for error in errors.values()), default=None)
    record.row(
        f"{name}: preflight of the fused {case.operator}",
        verdict="trusted" if verdict.trusted else f"not used: {verdict.reason}",
        largest_error=worst,
    )
    return verdict.trusted


def _time(
    record: Record, name: str, operator: Callable[..., tuple[Tensor, Tensor]], drawn: list[Tensor], T: int, plan: Plan
) -> None:
    """Forward and backward over the first T tokens of the drawn inputs."""
    *inputs, weights = [x[:, :T].contiguous() if x.dim() > 2 else x for x in drawn]
    work = functools.partial(forward_backward, operator, inputs, weights)
    ms = milliseconds(work, plan, calls=3)
    tokens = weights.shape[0] * T
    record.row(name, tokens=tokens, ms=ms, us_per_token=1e3 * ms / tokens, peak_GiB=peak_gib(work, plan))
