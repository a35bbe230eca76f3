"""The preflight's own logic, with planted faults on a CPU; and the fused path in Triton's interpreter (slow)."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from models.mixers.base import Mixer
from models.mixers.gated_delta import GatedDeltaNet, SimpleDeltaNet
from models.mixers.linear_attention import LinearAttention
from models.ops import delta_rule, gated_delta, preflight
from models.ops._delta_rule_chunked import chunked_gated_delta
from models.ops._preflight_cases import Case
from models.ops._preflight_check import compare, relative_rms
from models.ops.preflight import Verdict, run_preflight, shape_family

HERE = Path(__file__).parent
CASE = Case(B=2, T=70, h=1, H=2, K=16, V=8, dtype="bfloat16", device="cpu")


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    spec = importlib.util.spec_from_file_location("planted_faults", HERE / "planted_faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_right_kernel_passes_every_trial(dtype: str) -> None:
    findings = compare(chunked_gated_delta, replace(CASE, dtype=dtype))
    assert findings.failure is None
    assert set(findings.errors) == {trial.name for trial in Case.trials}
    assert all(set(errors) == set(Case.results) for errors in findings.errors.values())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong_beta_gradient", r"relative RMS error 0\.5 of dbeta exceeds 0\.02 \(seed 0\)"),
        ("wrong_decay_gradient", r"relative RMS error 0\.03 of dg exceeds 0\.02 \(seed 0\)"),
        ("wrong_output", r"exceeds 0\.02 \(seed 0\)"),
        ("wrong_only_for_correlated_keys", r"exceeds 0\.02 \(correlated keys, beta near 2\)"),
        ("not_finite", r"dg is not finite \(seed 0\)"),
        ("wrong_shape", r"final_state has shape \(2, 2, 8, 16\) instead of \(2, 2, 16, 8\) \(seed 0\)"),
    ],
)
def test_planted_faults_are_found(faults: ModuleType, fault: str, reason: str) -> None:
    findings = compare(getattr(faults, fault), CASE)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(findings.failure)


def test_relative_rms_of_a_scaled_copy() -> None:
    x = torch.randn(50)
    assert relative_rms(1.25 * x, x) == pytest.approx(0.25, rel=1e-5)


def test_subprocess_trusts_a_right_kernel() -> None:
    verdict = run_preflight(CASE, candidate="models.ops._delta_rule_chunked:chunked_gated_delta")
    assert verdict.trusted, verdict.reason
    assert verdict.reason == ""
    assert len(verdict.errors) == 3


@pytest.mark.parametrize(
    ("fault", "reason", "transient"),
    [
        ("crashes", "killed by SIGSEGV: ", False),
        ("raises", "ended with exit code 1: RuntimeError: planted: no kernel image", False),
        ("no_memory", "out of device memory: planted: tried to allocate 80 GiB", True),
    ],
)
def test_crashes_are_survived(fault: str, reason: str, transient: bool) -> None:
    verdict = run_preflight(CASE, candidate=f"planted_faults:{fault}", search_path=[HERE])
    assert not verdict.trusted
    assert verdict.reason.startswith(reason)
    assert verdict.transient is transient


@pytest.mark.slow
def test_a_hang_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "pid"
    monkeypatch.setenv("PLANTED_HANG", str(started))
    for timeout_s in (15, 120):  # a busy machine may need longer than the first to reach the candidate at all
        verdict = run_preflight(CASE, candidate="planted_faults:hangs", timeout_s=timeout_s, search_path=[HERE])
        expected = f"no answer within {timeout_s} s; the process was killed"
        assert verdict == Verdict(trusted=False, reason=expected)
        if started.exists():
            break
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


class Runs:
    """Stands in for the subprocess and counts."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict, self.count = verdict, 0

    def __call__(self, case: Case, **_: object) -> Verdict:
        self.count += 1
        return self.verdict


@pytest.fixture
def bad_runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    runs = Runs(Verdict(trusted=False, reason="relative RMS error 0.6 of dbeta", errors={"seed 0": {"dbeta": 0.6}}))
    monkeypatch.setattr(preflight, "run_preflight", runs)
    return runs


def test_a_verdict_is_kept_and_its_reason_logged_each_time(
    bad_runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="models.ops.preflight"):
        first = preflight.preflight(CASE, cache_dir=tmp_path)
        second = preflight.preflight(CASE, cache_dir=tmp_path)
    assert first == second == bad_runs.verdict
    assert bad_runs.count == 1
    assert len(caplog.records) == 2
    assert "chunked instead: relative RMS error 0.6 of dbeta (kept in " in caplog.records[1].getMessage()


@pytest.mark.parametrize("what", ["gpu", "driver", "torch", "triton", "fla", "mamba_ssm"])
def test_another_stack_is_tested_again(
    bad_runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    preflight.preflight(CASE, cache_dir=tmp_path)
    stack = preflight.stack_fingerprint("cpu")
    assert what in stack
    monkeypatch.setattr(preflight, "stack_fingerprint", lambda device: {**stack, what: "another"})
    preflight.preflight(CASE, cache_dir=tmp_path)
    assert bad_runs.count == 2


def test_damaged_and_foreign_records_are_tested_again(bad_runs: Runs, tmp_path: Path) -> None:
    preflight.preflight(CASE, cache_dir=tmp_path)
    (record,) = tmp_path.glob("*.json")
    foreign = json.loads(record.read_text())
    foreign["key"]["gpu"] = "another"
    for text in ("{", json.dumps(foreign)):
        record.write_text(text)
        preflight.preflight(CASE, cache_dir=tmp_path)
    assert bad_runs.count == 3
    assert [path.name for path in tmp_path.iterdir()] == [record.name]


def test_running_out_of_memory_is_not_kept(bad_runs: Runs, tmp_path: Path) -> None:
    bad_runs.verdict = Verdict(trusted=False, reason="out of device memory", transient=True)
    for _ in range(2):
        preflight.preflight(CASE, cache_dir=tmp_path)
    assert bad_runs.count == 2
    assert list(tmp_path.iterdir()) == []


def test_one_verdict_speaks_for_lengths_that_compile_alike() -> None:
    def family(T: int, B: int = 24) -> dict[str, object]:
        return shape_family(replace(CASE, T=T, B=B))

    assert family(607) == family(601) != family(608)
    assert family(640) == family(1024) != family(1088)
    assert family(607, B=17) == family(607, B=32) != family(607, B=33)
    assert shape_family(replace(CASE, K=32)) != shape_family(CASE)
    assert shape_family(replace(CASE, dtype="float32")) != shape_family(CASE)


def test_auto_on_a_gpu_follows_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice itself, with a tensor stub in place of the GPU that this suite does not need."""
    asked = []

    class OnGPU:
        def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> None:
            self.shape, self.dtype, self.device = shape, dtype, torch.device("cuda:0")

    k, v = OnGPU((4, 64, 2, 16)), OnGPU((4, 64, 2, 32))
    for trusted, expected in ((True, "fused"), (False, "chunked")):
        monkeypatch.setattr(preflight, "_trusted", {})
        monkeypatch.setattr(
            preflight, "preflight", lambda case, t=trusted: asked.append(case) or Verdict(trusted=t, reason="")
        )
        assert delta_rule._auto(k, v) == expected
        assert delta_rule._auto(k, v) == expected
    assert asked == 2 * [Case(B=4, T=64, h=2, H=2, K=16, V=32, dtype="bfloat16", device="cuda:0")]
    assert delta_rule._auto(OnGPU(k.shape, torch.float64), OnGPU(v.shape, torch.float64)) == "chunked"


def test_auto_on_a_cpu_is_chunked() -> None:
    q, k = torch.randn(2, 1, 20, 2, 4)
    v, g, beta = torch.randn(1, 20, 2, 3), -torch.rand(1, 20, 2), torch.rand(1, 20, 2)
    assert torch.equal(gated_delta(q, k, v, g, beta)[0], gated_delta(q, k, v, g, beta, impl="chunked")[0])


@pytest.mark.parametrize(
    "mixer",
    [
        GatedDeltaNet(16, 2, 4, 8, conv_width=4, norm_eps=1e-5),
        SimpleDeltaNet(16, 2, norm_eps=1e-5),
        LinearAttention(16, 2, delta_rule=True),
    ],
    ids=lambda mixer: type(mixer).__name__,
)
def test_mixers_give_the_fused_kernel_the_types_that_the_preflight_tests(
    mixer: Mixer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, torch.dtype]] = []

    def kernel(*, scale: float, initial_state: None, output_final_state: bool, **x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append({name: tensor.dtype for name, tensor in x.items()})
        return chunked_gated_delta(x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state, scale)

    stub = SimpleNamespace(chunk_gated_delta_rule=kernel)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", stub)
    monkeypatch.setattr(delta_rule, "chunked_gated_delta", delta_rule.fused_gated_delta)
    with torch.autocast("cpu", torch.bfloat16):
        mixer(torch.randn(1, 5, 16)).sum().backward()
    *inputs, _ = CASE.draw(Case.trials[0])
    delta_rule.fused_gated_delta(*inputs, None, 1.0)
    in_training, in_preflight = calls
    assert in_training == in_preflight
    assert {in_training[name] for name in "qkv"} == {torch.bfloat16}


@pytest.mark.slow
def test_fused_path_passes_in_the_triton_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our call of flash-linear-attention: argument order, layout, scale, grouped heads, all gradients."""
    if sys.platform != "linux":
        pytest.skip("Triton has wheels for Linux only")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = replace(CASE, B=1, dtype="float32")
    verdict = run_preflight(case, candidate="interpreted_fla:fused", timeout_s=500, search_path=[HERE])
    assert verdict.trusted, verdict.reason
    assert max(error for errors in verdict.errors.values() for error in errors.values()) < 1e-5
