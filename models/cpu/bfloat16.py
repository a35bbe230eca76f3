"""bfloat16 products on processors that have no instructions for them.

PyTorch hands them to oneDNN, which with AVX-512 takes three times as long as for float32 and without it up to a
hundred times. The product of two bfloat16 numbers is exact in float32, and instructions for bfloat16 add in float32
too: a float32 product of the rounded operands, rounded at the end, is the same function, at the speed of float32.

Shapes: N rows, D width in, F width out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = {torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul, torch.mm, torch.addmm}


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16."""
    if device.type != "cpu":
        return True
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is None:  # older PyTorch, which a machine with a GPU may have
        return bool(torch.cpu._is_avx512_bf16_supported())
    has = ask()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _in_float32(x: Tensor) -> bool:
    """Whether a product of x, bfloat16 by its own type or by autocast, is to be made of float32 numbers."""
    if multiplies_bfloat16(x.device):
        return False
    narrowed = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == torch.bfloat16 or (narrowed and x.dtype == torch.float32)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of one type, outside autocast; no gradient."""
    return (a.float() @ b.float()).bfloat16() if _in_float32(a) else a @ b


class Products(TorchFunctionMode):
    """Products of matrices that another library makes within the block, as `product` makes them; no gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and _in_float32(args[0]):
            return func(*(a.float() for a in args), **kwargs or {}).bfloat16()
        return func(*args, **kwargs or {})


def linear(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x [..., D] -> x W^T + b [..., F] as `torch.nn.functional.linear` has it, in the autocast type inside autocast."""
    return _RoundedLinear.apply(x, weight_FD, bias_F) if _in_float32(x) else F.linear(x, weight_FD, bias_F)


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, heads [B, h, T, E]."""
    if not _in_float32(q):
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).bfloat16()


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, x: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight_FD)
        return F.linear(x.float(), weight_FD.float(), None if bias_F is None else bias_F.float()).bfloat16()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_FD = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grads[0].float()
        grad_NF = grad.reshape(-1, grad.shape[-1])
        d_x = (grad @ weight_FD.float()).bfloat16() if needs_x else None
        d_weight = grad_NF.T @ x.reshape(-1, x.shape[-1]).float() if needs_weight else None
        return d_x, d_weight, grad_NF.sum(0) if needs_bias else None
