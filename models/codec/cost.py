"""What a codec language model costs: parameters and floating-point operations per token, without allocating it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from models.codec.model import Block, CodecLM, CodecLMConfig
from models.codec.text import CrossAttention


@dataclass(frozen=True)
class LMCost:
    """parameters: all of them. embedding: of these, the input embeddings and the output heads.
    memory_cache: of these, W_u and gate biases. text: of these, the text encoder and the cross-attention to it.
    flops_per_token: forward, mean over a sequence of the context."""

    parameters: int
    embedding: int
    memory_cache: int
    flops_per_token: float
    text: int = 0


@lru_cache(maxsize=256)
def lm_cost(config: CodecLMConfig, context: int | None = None) -> LMCost:
    """Counted on the meta device from the modules themselves.

    Operations are two for each weight of a projection or head plus what each mixer declares for its sequence part
    (attention scores over the mean number of visible tokens, state updates and reads). Norms, activations and
    embedding look-ups are left out. A text counts with its greatest length, its encoding spread over the sequence.
    Training costs about three times the forward pass.
    """
    with torch.device("meta"):
        model = CodecLM(config)
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    apart = [m for m in (model.text_encoder, *(block.cross for block in blocks)) if m is not None]
    counted_apart = {id(m) for some in apart for m in some.modules()}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in counted_apart]
    projections = sum(m.weight.numel() for m in linear) + model.heads.numel()
    sequence = sum(block.mixer.sequence_flops_per_token(context or config.context) for block in blocks)
    return LMCost(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding=model.embedding.numel() + model.heads.numel(),
        memory_cache=sum(p.numel() for name, p in model.named_parameters() if ".mixer.gate." in name),
        flops_per_token=2.0 * projections + sequence + _text_flops_per_token(model, context or config.context),
        text=sum(p.numel() for name, p in model.named_parameters() if _text_group(name)),
    )


def _text_flops_per_token(model: CodecLM, context: int) -> float:
    if model.text_encoder is None:
        return 0.0
    symbols = model.text_encoder.max_bytes + 1
    crosses = [block.cross for block in model.blocks if isinstance(block.cross, CrossAttention)]
    once = model.text_encoder.flops_per_text(symbols) + sum(c.flops_per_text(symbols) for c in crosses)
    return once / context + sum(c.flops_per_token(symbols) for c in crosses)


def _text_group(name: str) -> str:
    """Group of a parameter of the text conditioning, "" for any other."""
    if name.startswith("text_encoder."):
        return "text_encoder"
    return "cross_attention" if ".cross." in name or ".cross_norm." in name else ""


def match_parameters(
    config: CodecLMConfig, target: int, *, tolerance: float = 0.01, multiple: int = 8
) -> CodecLMConfig:
    """The same architecture with the MLP width d_ff (a multiple of `multiple`) that brings it closest to `target`.

    Parameters are affine in d_ff, with slope 3 d_model n_layers. Raises ValueError when no width comes within
    `tolerance` of the target.
    """
    slope = 3 * config.d_model * config.n_layers
    without_mlp = lm_cost(config).parameters - slope * config.d_ff
    d_ff = max(1, round((target - without_mlp) / slope / multiple)) * multiple
    matched = replace(config, d_ff=d_ff)
    parameters = lm_cost(matched).parameters
    if abs(parameters - target) > tolerance * target:
        raise ValueError(
            f"{parameters:,} parameters at d_ff={d_ff}, closest to {target:,}, are off by more than {tolerance:.1%}; "
            "choose another d_model or n_layers"
        )
    return matched


def names_by_group(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(parameter name, group), for gradient norms by kind of parameter: embedding, heads, norm, mlp, memory_cache,
    text_encoder, cross_attention, and mixer.<class of the mixer that owns it>."""
    owners = {name: module for name, module in model.named_modules() if name.endswith(".mixer")}
    for name, _ in model.named_parameters():
        if group := _text_group(name):
            yield name, group
        elif ".mixer.gate." in name:
            yield name, "memory_cache"
        elif ".mixer." in name:
            owner = owners[name.split(".mixer.")[0] + ".mixer"]
            inner = getattr(owner, "inner", None)  # of a mixer with memory caching; a width in the Mambas
            yield name, f"mixer.{type(inner if isinstance(inner, nn.Module) else owner).__name__}"
        elif ".mlp." in name:
            yield name, "mlp"
        else:
            yield name, "norm" if "norm" in name else name
