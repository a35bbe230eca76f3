"""Mamba-1 and Mamba-2 scans: chunked = recurrent (float64), gradients, states, causality, closed forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.cpu.threads import torch_threads
from models.ops import _mamba1_chunked, _mamba2_chunked, selective_scan, selective_scan_step, ssd, ssd_step
from models.ops._mamba1_chunked import chunk_length, solve_

Inputs = dict[str, Tensor]


def randn(gen: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=gen, dtype=torch.float64).float().double()


def mamba1_inputs(T: int, *, fast_decay: bool = False, batch: int = 2, channels: int = 7, states: int = 5) -> Inputs:
    gen = torch.Generator().manual_seed(T)
    D, N = channels, states
    return {
        "x": randn(gen, batch, T, D),
        "dt": F.softplus(randn(gen, batch, T, D) + (1.0 if fast_decay else -3.0)).float().double(),
        "A": -torch.arange(1.0, N + 1, dtype=torch.float64).expand(D, N) - randn(gen, D, N).abs(),
        "B": randn(gen, batch, T, N),
        "C": randn(gen, batch, T, N),
        "D": randn(gen, D),
        "initial_state": randn(gen, batch, D, N),
    }


def mamba2_inputs(T: int, *, fast_decay: bool = False, batch: int = 2, groups: int = 2) -> Inputs:
    gen = torch.Generator().manual_seed(T)
    H, P, N = 4, 3, 5
    return {
        "x": randn(gen, batch, T, H, P),
        "dt": F.softplus(randn(gen, batch, T, H) + (1.0 if fast_decay else -3.0)).float().double(),
        "A": -1 - 5 * randn(gen, H).abs(),
        "B": randn(gen, batch, T, groups, N),
        "C": randn(gen, batch, T, groups, N),
        "D": randn(gen, H),
        "initial_state": randn(gen, batch, H, P, N),
    }


SCANS = [
    pytest.param(selective_scan, mamba1_inputs, id="mamba1"),
    pytest.param(ssd, mamba2_inputs, id="mamba2"),
]
OVER_TIME = ("x", "dt", "B", "C")


def relative(x: Tensor, reference: Tensor) -> float:
    return ((x.double() - reference).abs().max() / reference.abs().max()).item()


def run(scan: Callable, inputs: Inputs, dtype: torch.dtype, impl: str) -> Inputs:
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    y, final = scan(**leaves, impl=impl)
    gen = torch.Generator().manual_seed(1)
    loss_weights = [torch.randn(z.shape, generator=gen, dtype=torch.float64).to(dtype) for z in (y, final)]
    grads = torch.autograd.grad([y, final], list(leaves.values()), loss_weights)
    return {"y": y.detach(), "final": final.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize(("scan", "make"), SCANS)
@pytest.mark.parametrize("fast_decay", [False, True])
def test_chunked_float32_equals_recurrent_float64(scan: Callable, make: Callable, fast_decay: bool) -> None:
    inputs = {name: x.float().double() for name, x in make(200, fast_decay=fast_decay).items()}
    expected = run(scan, inputs, torch.float64, "recurrent")
    actual = run(scan, inputs, torch.float32, "chunked")
    errors = {name: relative(actual[name], expected[name]) for name in expected}
    assert max(errors["y"], errors["final"]) <= 1e-6, errors
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize(("scan", "make"), SCANS)
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 130])
def test_any_length(scan: Callable, make: Callable, T: int) -> None:
    expected = run(scan, make(T), torch.float64, "recurrent")
    actual = run(scan, make(T), torch.float64, "chunked")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("backwards", [False, True])
def test_pairing_neighbours_solves_the_recurrence(C: int, backwards: bool) -> None:
    gen = torch.Generator().manual_seed(C)
    decay, h = randn(gen, 2, C, 3, 4), randn(gen, 2, C, 3, 4)
    expected = list(h.unbind(1))
    order = range(C - 2, -1, -1) if backwards else range(1, C)
    for t in order:
        expected[t] = expected[t] + decay[:, t] * expected[t + 1 if backwards else t - 1]
    solve_(decay, h, backwards=backwards)
    torch.testing.assert_close(h, torch.stack(expected, 1), rtol=1e-12, atol=1e-12)


def test_a_gpus_long_chunks_give_the_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    for C, T in ((64, 130), (128, 100)):
        monkeypatch.setattr(_mamba1_chunked, "CHUNK", C)
        expected = run(selective_scan, mamba1_inputs(T), torch.float64, "recurrent")
        actual = run(selective_scan, mamba1_inputs(T), torch.float64, "chunked")
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-11, msg=name)


def test_chunks_hold_what_a_gpu_has_room_for() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    speech = 768 * 64
    assert chunk_length(8, speech, torch.float32, cpu) == 16
    assert chunk_length(8, speech, torch.float32, gpu) == 128
    assert chunk_length(8, speech, torch.float64, gpu) == 64
    assert chunk_length(10_000, speech, torch.float32, gpu) == 16


class Counted(TorchDispatchMode):
    """Counts the operations that a device would be sent."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_operations_of_a_chunk_grow_with_the_logarithm_of_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for C in (64, 128, 256):
        monkeypatch.setattr(_mamba1_chunked, "CHUNK", C)
        inputs = {name: x.requires_grad_() for name, x in mamba1_inputs(C).items()}
        with Counted() as counted:
            y, _ = selective_scan(**inputs, impl="chunked")
            torch.autograd.grad(y.sum(), list(inputs.values()), allow_unused=True)
        counts.append(counted.count)
    assert counts[1] - counts[0] == counts[2] - counts[1] < 64


@pytest.mark.parametrize(
    ("T", "channels", "states"), [(1, 1, 1), (15, 64, 16), (16, 65, 3), (17, 200, 5), (50, 320, 2)]
)
def test_cpu_kernels_for_any_number_of_channels(T: int, channels: int, states: int) -> None:
    inputs = {name: x.float().double() for name, x in mamba1_inputs(T, channels=channels, states=states).items()}
    expected = run(selective_scan, inputs, torch.float64, "recurrent")
    actual = run(selective_scan, inputs, torch.float32, "chunked")
    errors = {name: relative(actual[name], expected[name]) for name in expected}
    assert max(errors["y"], errors["final"]) <= 1e-6, errors
    assert max(errors.values()) <= 1e-5, errors


def test_cpu_kernels_read_strided_inputs() -> None:
    inputs = {name: x.float() for name, x in mamba1_inputs(40, channels=70).items()}
    both = torch.cat([inputs["B"], inputs["C"]], 2)
    strided = {
        **inputs,
        "x": inputs["x"].transpose(1, 2).contiguous().transpose(1, 2),
        "B": both[..., :5],
        "C": both[..., 5:],
        "A": inputs["A"].t().contiguous().t(),
        "initial_state": inputs["initial_state"].transpose(1, 2).contiguous().transpose(1, 2),
    }
    assert not any(strided[name].is_contiguous() for name in ("x", "A", "B", "C", "initial_state"))
    expected, actual = (run(selective_scan, z, torch.float32, "chunked") for z in (inputs, strided))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_threads_change_no_bit_of_the_cpu_kernels() -> None:
    inputs = {name: x.float() for name, x in mamba1_inputs(40, channels=300).items()}
    with torch_threads(1):
        expected = run(selective_scan, inputs, torch.float32, "chunked")
    for threads in (2, 3, 16):
        with torch_threads(threads):
            actual = run(selective_scan, inputs, torch.float32, "chunked")
        for name, value in expected.items():
            assert torch.equal(actual[name], value), (threads, name)


def test_nan_spoils_the_tokens_after_it_and_no_channel_beside_it() -> None:
    inputs = {name: x.float() for name, x in mamba1_inputs(40).items()}
    inputs["dt"][0, 20, 3] = torch.nan
    y, final = selective_scan(**inputs)
    spoilt = torch.zeros_like(y, dtype=torch.bool)
    spoilt[0, 20:, 3] = True
    assert torch.equal(y.isnan(), spoilt)
    assert torch.equal(final.isnan().all(2), spoilt[:, -1])


def test_decay_below_and_above_the_range_of_float32() -> None:
    inputs = {name: x.float() for name, x in mamba1_inputs(3).items()}
    del inputs["D"]
    inputs["dt"] = torch.full_like(inputs["dt"], 1e4)
    y, final = selective_scan(**inputs)
    alone = (inputs["dt"] * inputs["x"]).double()
    assert relative(y, alone * (inputs["B"] * inputs["C"]).double().sum(2, keepdim=True)) <= 1e-6
    assert relative(final, alone[:, -1, :, None] * inputs["B"][:, -1, None]) <= 1e-6
    y, _ = selective_scan(**{**inputs, "A": -inputs["A"]})
    assert not y.isfinite().any()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_of_heads_and_spans_of_time(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mamba2_chunked, "SPAN", 64)
    inputs = mamba2_inputs(150, groups=groups)
    expected = run(ssd, inputs, torch.float64, "recurrent")
    actual = run(ssd, inputs, torch.float64, "chunked")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize(("scan", "make"), SCANS)
def test_gradcheck(scan: Callable, make: Callable) -> None:
    names, leaves = zip(*make(5, batch=1).items(), strict=True)
    leaves = tuple(x.requires_grad_() for x in leaves)
    assert torch.autograd.gradcheck(lambda *args: scan(**dict(zip(names, args, strict=True))), leaves)


@pytest.mark.parametrize(("scan", "make"), SCANS)
@pytest.mark.parametrize("used", [0, 1])
def test_gradient_when_one_result_is_unused(scan: Callable, make: Callable, used: int) -> None:
    grads = {}
    for impl in ("recurrent", "chunked"):
        leaves = {name: x.requires_grad_() for name, x in make(40).items()}
        result = scan(**leaves, impl=impl)[used]
        grads[impl] = torch.autograd.grad(result.square().sum(), list(leaves.values()), allow_unused=True)
    for slow, fast in zip(grads["recurrent"], grads["chunked"], strict=True):
        slow, fast = (torch.zeros(()) if z is None else z for z in (slow, fast))
        torch.testing.assert_close(fast, slow.to(fast.dtype).expand_as(fast), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("scan", "make"), SCANS)
def test_two_halves_equal_the_whole(scan: Callable, make: Callable) -> None:
    inputs = make(90)
    whole, final = scan(**inputs)
    first = {name: x[:, :37] if name in OVER_TIME else x for name, x in inputs.items()}
    y1, state = scan(**first)
    second = {name: x[:, 37:] if name in OVER_TIME else x for name, x in inputs.items()}
    y2, state = scan(**{**second, "initial_state": state})
    torch.testing.assert_close(torch.cat([y1, y2], 1), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("scan", "step", "make"),
    [(selective_scan, selective_scan_step, mamba1_inputs), (ssd, ssd_step, mamba2_inputs)],
)
def test_steps_equal_the_sequence(scan: Callable, step: Callable, make: Callable) -> None:
    inputs = {name: x.float() for name, x in make(40).items()}
    y, final = scan(**inputs)
    state = inputs.pop("initial_state")
    skip = inputs.pop("D")
    for t in range(40):
        token = {name: x[:, t] if name in OVER_TIME else x for name, x in inputs.items()}
        y_t, state = step(**token, state=state, D=skip)
        torch.testing.assert_close(y_t, y[:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scan", "make"), SCANS)
def test_no_gradient_from_the_future(scan: Callable, make: Callable) -> None:
    inputs = {name: x.requires_grad_() for name, x in make(150).items()}
    y, _ = scan(**inputs)
    grads = torch.autograd.grad(y[:, :70].square().sum(), [inputs[name] for name in OVER_TIME])
    for grad in grads:
        assert grad[:, 70:].abs().max() == 0
        assert grad[:, :70].abs().max() > 0


@pytest.mark.parametrize(("scan", "make"), SCANS)
def test_no_decay_is_a_running_sum(scan: Callable, make: Callable) -> None:
    inputs = make(100)
    inputs["A"] = torch.zeros_like(inputs["A"])
    inputs["B"] = torch.ones_like(inputs["B"])
    inputs["C"] = torch.ones_like(inputs["C"])
    y, _ = scan(inputs["x"], inputs["dt"], inputs["A"], inputs["B"], inputs["C"])
    dt = inputs["dt"] if inputs["dt"].shape == inputs["x"].shape else inputs["dt"].unsqueeze(3)
    torch.testing.assert_close(y, inputs["B"].shape[-1] * (dt * inputs["x"]).cumsum(1))


def test_mamba2_is_mamba1_with_one_rate_a_head() -> None:
    inputs = mamba2_inputs(80, groups=1)
    y, final = ssd(**inputs)
    B, T, H, P = inputs["x"].shape
    N = inputs["B"].shape[3]
    y1, final1 = selective_scan(
        inputs["x"].flatten(2),
        inputs["dt"].repeat_interleave(P, 2),
        inputs["A"].repeat_interleave(P)[:, None].expand(H * P, N),
        inputs["B"].squeeze(2),
        inputs["C"].squeeze(2),
        D=inputs["D"].repeat_interleave(P),
        initial_state=inputs["initial_state"].flatten(1, 2),
    )
    torch.testing.assert_close(y, y1.view(B, T, H, P))
    torch.testing.assert_close(final, final1.view_as(final))


@pytest.mark.parametrize(("scan", "make"), SCANS)
def test_bfloat16_and_autocast_are_computed_in_float32(scan: Callable, make: Callable) -> None:
    inputs = make(150)
    low = {name: inputs[name].bfloat16() if name in OVER_TIME else inputs[name].float() for name in inputs}
    expected, expected_final = scan(**{name: x.double() for name, x in low.items()}, impl="recurrent")
    leaves = {name: x.requires_grad_() for name, x in low.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, final = scan(**leaves)
        grads = torch.autograd.grad(y.float().square().sum(), list(leaves.values()))
    assert y.dtype == torch.bfloat16
    assert relative(final.detach(), expected_final) <= 1e-6
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5)
    assert [g.dtype for g in grads] == [x.dtype for x in leaves.values()]


def test_bad_arguments_say_what_was_expected() -> None:
    inputs = mamba2_inputs(8, groups=3)
    with pytest.raises(ValueError, match="4 heads are not a multiple of 3 groups"):
        ssd(**inputs)
    inputs = mamba2_inputs(8)
    with pytest.raises(ValueError, match=r"dt has shape \(2, 7, 4\), expected \[B, T, H\] = \(2, 8, 4\)"):
        ssd(**{**inputs, "dt": inputs["dt"][:, :7]})
    inputs = mamba1_inputs(8)
    with pytest.raises(ValueError, match=r"A has shape \(6, 5\), expected \[D, N\] = \(7, 5\)"):
        selective_scan(**{**inputs, "A": inputs["A"][:6]})
    with pytest.raises(ValueError, match="impl='fast' is not one of auto, recurrent, chunked, fused"):
        selective_scan(**inputs, impl="fast")
