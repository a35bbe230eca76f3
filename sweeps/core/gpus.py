"""GPUs by name, as their vendors' datasheets have them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sweeps.core.cells import UserError, nearest


@dataclass(frozen=True)
class GPUType:
    """A GPU as its vendor's datasheet has it. bf16_tflops: TFLOP/s without sparsity; memory_tb_s: TB/s."""

    bf16_tflops: float
    memory_tb_s: float
    source: str


# Datasheets that print the rate with 2:4 sparsity are halved. Written down from memory: look a value up before money
# depends on it.
GPU_TYPES = {
    "a10": GPUType(125, 0.600, "NVIDIA A10 datasheet"),
    "a100-40gb": GPUType(312, 1.555, "NVIDIA A100 datasheet"),
    "a100-80gb-pcie": GPUType(312, 1.935, "NVIDIA A100 80GB datasheet"),
    "a100-80gb-sxm": GPUType(312, 2.039, "NVIDIA A100 80GB datasheet"),
    "b200": GPUType(2250, 8.0, "NVIDIA DGX B200 datasheet, an eighth"),
    "h100-pcie": GPUType(756, 2.0, "NVIDIA H100 datasheet"),
    "h100-sxm": GPUType(989, 3.35, "NVIDIA H100 datasheet"),
    "h200-sxm": GPUType(989, 4.8, "NVIDIA H200 datasheet"),
    "l4": GPUType(121, 0.300, "NVIDIA L4 datasheet"),
    "l40s": GPUType(362, 0.864, "NVIDIA L40S datasheet"),
    "mi300x": GPUType(1307, 5.3, "AMD Instinct MI300X datasheet"),
    "rtx3090": GPUType(71, 0.936, "NVIDIA GA102 whitepaper, FP32 accumulate"),
    "rtx4090": GPUType(165, 1.008, "NVIDIA Ada whitepaper, FP32 accumulate"),
    "rtx6000-ada": GPUType(364, 0.960, "NVIDIA RTX 6000 Ada datasheet"),
}


def asked_types(texts: Iterable[str]) -> dict[str, float]:
    """{GPU type: price an hour, 0 where none is given} of texts `type` or `type:price`; raises UserError."""
    out = {}
    for text in texts:
        name, _, price = text.partition(":")
        if name not in GPU_TYPES:
            raise UserError(f"gpu={name!r} is not known{nearest(name, GPU_TYPES)}; types: {', '.join(GPU_TYPES)}")
        try:
            out[name] = float(price or 0.0)
        except ValueError:
            raise UserError(f"gpu={text!r} has no number after the colon; write {name}:2.5") from None
        if not 0.0 <= out[name] < float("inf"):
            raise UserError(f"gpu={text!r} has a price that is not 0 or more; write {name}:2.5")
    return out
