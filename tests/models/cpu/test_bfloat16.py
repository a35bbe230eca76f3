"""bfloat16 on a processor without instructions for it: the same function, no product that must be emulated."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models.codec.delay import training_pair
from models.cpu.bfloat16 import Linear, attention, linear, product
from models.cpu.bfloat16 import Products as EmulatedProducts

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu"}


def without_instructions(monkeypatch: pytest.MonkeyPatch, *, has: bool = False) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": has})


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def narrow() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


class Products(TorchDispatchMode):
    """Types of the operands of every product, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.removesuffix("_") in PRODUCTS or "attention" in name:
            self.types |= {(name, x.dtype) for x in args if isinstance(x, torch.Tensor) and x.ndim > 1}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (24,)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_rounded_product_of_rounded_operands(monkeypatch, shape, bias) -> None:
    without_instructions(monkeypatch)
    layer = Linear(24, 10, bias=bias)
    x = drawn(*shape).requires_grad_()
    with narrow():
        y = layer(x)
    low = {"x": x.detach().bfloat16().double(), "w": layer.weight.detach().bfloat16().double()}
    exact = low["x"] @ low["w"].T
    if bias:
        exact = exact + layer.bias.detach().bfloat16().double()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)  # half a unit in the last of eight places
    g = drawn(*y.shape, seed=1).bfloat16()
    y.backward(g)
    rows, d = low["x"].reshape(-1, 24), g.double().reshape(-1, 10)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad.double(), (d @ low["w"]).view(shape), rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad.double(), d.T @ rows, rtol=1e-5, atol=1e-5)
    if bias:
        torch.testing.assert_close(layer.bias.grad.double(), d.sum(0), rtol=1e-5, atol=1e-5)


def test_product_and_attention_are_the_rounded_ones(monkeypatch) -> None:
    without_instructions(monkeypatch)
    a, b = drawn(9, 16).bfloat16(), drawn(16, 5, seed=1).bfloat16()
    torch.testing.assert_close(product(a, b).double(), a.double() @ b.double(), rtol=2**-8, atol=1e-6)
    q, k, v = (drawn(2, 3, 8, 4, seed=s).bfloat16() for s in range(3))
    with narrow():
        o = attention(q, k, v, is_causal=True)
    assert o.dtype == torch.bfloat16
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(o.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_precisions_are_left_alone(monkeypatch, dtype) -> None:
    without_instructions(monkeypatch)
    x, w = drawn(5, 8).to(dtype), drawn(3, 8, seed=1).to(dtype)
    assert torch.equal(linear(x, w), F.linear(x, w))
    assert torch.equal(product(x, w.T), x @ w.T)
    if dtype == torch.float64:
        with narrow():
            assert torch.equal(linear(x, w), F.linear(x, w))


def test_a_processor_with_instructions_uses_them(monkeypatch) -> None:
    without_instructions(monkeypatch, has=True)
    x, w = drawn(5, 8), drawn(3, 8, seed=1)
    with Products() as seen, narrow():
        linear(x, w)
    assert {dtype for _, dtype in seen.types} == {torch.bfloat16}


def test_models_train_without_an_emulated_product_to_the_same_gradients(
    monkeypatch, codec_architecture, tiny_codec_lm
) -> None:
    codes = torch.randint(0, 13, (2, 3, 18), generator=torch.Generator().manual_seed(0))
    inputs, targets = training_pair(codes, pad=13, bos=14)
    gradients, losses = [], []
    for has in (True, False):
        without_instructions(monkeypatch, has=has)
        model = tiny_codec_lm(codec_architecture)
        with Products() as seen:
            with narrow():
                loss = model.loss(inputs, targets).loss
            loss.backward()
        emulated = {kind for kind in seen.types if kind[1] == torch.bfloat16}
        assert bool(emulated) == has, emulated
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert error < 2e-2, f"{codec_architecture}: gradients differ by {error:.2g}"


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_muon_multiplies_in_float32_and_goes_the_same_way(monkeypatch, has, shape) -> None:
    """One step of PyTorch's Muon, whose Newton-Schulz iteration multiplies bfloat16 matrices."""

    def step(block) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = drawn(*shape, seed=3)
        with block, products:
            torch.optim.Muon([weight], lr=1.0, weight_decay=0.0).step()
        return weight.detach()

    without_instructions(monkeypatch, has=has)
    products = Products()
    plain = step(nullcontext())
    assert products.types == {(name, torch.bfloat16) for name in ("mm", "addmm")}
    products = Products()
    found = step(EmulatedProducts())
    assert products.types == {(name, torch.bfloat16 if has else torch.float32) for name in ("mm", "addmm")}
    assert (found == plain).all() if has else (found - plain).norm() < 0.02 * plain.norm()  # eight steps of 2^-8
