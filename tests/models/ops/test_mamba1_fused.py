"""The call of mamba-ssm's kernels and its preflight, with a stub in place of the package and of the GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.ops import mamba1, preflight, selective_scan
from models.ops._mamba1_fused import fused_scan
from models.ops._preflight_cases import ScanCase
from models.ops._preflight_check import compare
from models.ops.preflight import Verdict, run_preflight, shape_family

CASE = ScanCase(B=2, T=40, D=6, N=5, dtype="float32", device="cpu")


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 1.01 * grads[0]


def recurrence(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, return_last_state: bool
) -> tuple[Tensor, ...]:
    """mamba-ssm's signature and layout: u, delta [B, D, L], A [D, N], B, C [B, N, L]."""
    assert return_last_state
    assert {z.dtype for z in (u, delta, A, B, C)} == {torch.float32}
    assert all(z.stride(-1) == 1 for z in (u, delta, A, B, C))
    state, outputs = u.new_zeros(len(u), *A.shape), []
    for t in range(u.shape[2]):
        state = torch.exp(delta[..., t, None] * A) * state + (delta * u)[..., t, None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(2))
    return torch.stack(outputs, 2), state


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = recurrence  # type: ignore[attr-defined]
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    return interface


def test_the_call_has_the_packages_layout_and_passes_the_preflight(package: ModuleType) -> None:
    findings = compare(fused_scan, CASE)
    assert findings.failure is None
    assert max(error for errors in findings.errors.values() for error in errors.values()) < 1e-5
    assert all(tuple(errors) == CASE.results for errors in findings.errors.values())


@pytest.mark.parametrize(("name", "gradient"), [("u", "dx"), ("delta", "ddt"), ("A", "dA"), ("B", "dB"), ("C", "dC")])
def test_a_gradient_that_is_wrong_by_a_hundredth_is_found(package: ModuleType, name: str, gradient: str) -> None:
    def faulty(*inputs: Tensor, **options: bool) -> tuple[Tensor, ...]:
        at = ("u", "delta", "A", "B", "C").index(name)
        changed = [_WrongGradient.apply(z) if i == at else z for i, z in enumerate(inputs)]
        return recurrence(*changed, **options)  # type: ignore[arg-type]

    package.selective_scan_fn = faulty  # type: ignore[attr-defined]
    assert compare(fused_scan, CASE).failure == f"relative RMS error 0.01 of {gradient} exceeds 0.001 (seed 0)"


def test_a_kernel_that_forgets_is_found() -> None:
    def forgets(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        halves = [selective_scan(x[:, t], dt[:, t], A, B[:, t], C[:, t]) for t in (slice(20), slice(20, 40))]
        return torch.cat([y for y, _ in halves], 1), halves[1][1]

    assert compare(forgets, CASE).failure is not None


def test_subprocess_trusts_the_chunked_scan() -> None:
    verdict = run_preflight(CASE, candidate="models.ops.mamba1:selective_scan")
    assert verdict.trusted, verdict.reason
    assert all(tuple(errors) == CASE.results for errors in verdict.errors.values())


def test_the_gradient_of_the_final_state_is_refused(package: ModuleType) -> None:
    inputs = [x.requires_grad_() for x in CASE.draw(CASE.trials[0])[:-1]]
    y, final = fused_scan(*inputs)
    torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"no gradient of the final state; choose impl='chunked'"):
        torch.autograd.grad(final.sum(), inputs)


def test_fused_needs_a_gpu_and_no_initial_state() -> None:
    inputs = CASE.draw(CASE.trials[0])[:-1]
    with pytest.raises(ValueError, match=r"impl='fused' needs CUDA tensors, got device=cpu; choose impl='chunked'"):
        selective_scan(*inputs, impl="fused")
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(ValueError, match=r"choose impl='chunked' for an initial_state"):
        mamba1._check_fused(on_gpu, torch.zeros(2, 6, 5))  # type: ignore[arg-type]


def test_auto_on_a_gpu_follows_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
        return SimpleNamespace(shape=shape, dtype=dtype, device=torch.device("cuda:0"))

    x, dt, A = tensor(4, 64, 32, dtype=torch.bfloat16), tensor(4, 64, 32), tensor(32, 16)
    monkeypatch.setattr(mamba1, "serves", lambda states: states <= 16)
    for trusted, expected in ((True, "fused"), (False, "chunked")):
        monkeypatch.setattr(preflight, "_trusted", {})
        monkeypatch.setattr(
            preflight, "preflight", lambda case, t=trusted: asked.append(case) or Verdict(trusted=t, reason="")
        )
        assert mamba1._auto(x, dt, A, None) == expected
    assert asked == 2 * [ScanCase(B=4, T=64, D=32, N=16, dtype="float32", device="cuda:0")]
    monkeypatch.setattr(preflight, "_trusted", {})
    assert mamba1._auto(x, dt, A, torch.zeros(4, 32, 16)) == "chunked"
    assert mamba1._auto(x, tensor(4, 64, 32, dtype=torch.float64), A, None) == "chunked"
    assert mamba1._auto(x, dt, tensor(32, 17), None) == "chunked"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert mamba1._auto(x, dt, A, None) == "chunked"
    assert len(asked) == 2


def test_one_verdict_speaks_for_channels_and_states_of_one_kernel() -> None:
    assert shape_family(CASE) == shape_family(replace(CASE, T=39, B=2)) != shape_family(replace(CASE, N=6))
    assert shape_family(CASE) != shape_family(replace(CASE, D=7))
