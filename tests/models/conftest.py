"""Fixtures for the codec language models: a tiny one for every mixer and every option of memory caching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from models.codec.model import CodecLM, CodecLMConfig, build_codec_lm
from models.mixers.memory_cache import MemoryCacheConfig

CACHE = MemoryCacheConfig(segment=5, start_layer=2, gate_bias_init=0.5)
LINEAR: dict[str, Any] = {"mixer": "linear_attention"}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "attention": {"mixer": "attention"},
    "gdn_hybrid": {"mixer": "gated_delta", "attention_every": 2, "force_final_attention": True},
    "gdn": {"mixer": "gated_delta"},
    "deltanet_simple": {"mixer": "deltanet_simple", "attention_every": 3},
    "mamba": {"mixer": "mamba"},
    "mamba2": {"mixer": "mamba2"},
    "mamba_hybrid": {"mixer": "mamba", "attention_every": 3},
    "la": LINEAR,
    "la_delta": {**LINEAR, "delta_rule": True},
    "mc_la": {**LINEAR, "memory_cache": CACHE},
    "mc_la_paper_gate": {**LINEAR, "memory_cache": replace(CACHE, gate_bias_init=None)},
    "mc_la_low_rank_normalized": {**LINEAR, "memory_cache": replace(CACHE, rank=4, normalized_retrieval=True)},
    "mc_la_alone": {**LINEAR, "memory_cache": replace(CACHE, cumulative=False)},
    "mc_la_alone_normalized": {
        **LINEAR,
        "memory_cache": replace(CACHE, cumulative=False, normalized_retrieval=True),
    },
    "mc_la_delta": {**LINEAR, "delta_rule": True, "memory_cache": CACHE},
    "mc_la_delta_alone": {**LINEAR, "delta_rule": True, "memory_cache": replace(CACHE, cumulative=False)},
    "mc_mamba": {"mixer": "mamba", "memory_cache": CACHE},
    "mc_mamba2": {"mixer": "mamba2", "memory_cache": replace(CACHE, gate_bias_init=None)},
}


def _config(name: str, **changes: Any) -> CodecLMConfig:
    """Three layers of width 32, three codebooks of 13 codes."""
    sizes: dict[str, Any] = {
        "d_model": 32,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 48,
        "n_codebooks": 3,
        "context": 64,
        "codebook_size": 13,
        "head_k": 6,
        "head_v": 10,
        "d_state": 5,
        "mamba2_head": 16,
    }
    return CodecLMConfig(**{**sizes, **ARCHITECTURES[name], **changes})


def _model(name: str, *, dtype: torch.dtype = torch.float32, spread: float = 0.1, **changes: Any) -> CodecLM:
    """A tiny model whose weights, norms and biases included, are moved off their initial values."""
    model = build_codec_lm(_config(name, **changes), seed=1).to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def _tokens(batch: int = 2, steps: int = 23, *, seed: int = 3) -> torch.Tensor:
    """Random columns of a tiny model, special tokens included: [B, 3, T]."""
    return torch.randint(0, 16, (batch, 3, steps), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=ARCHITECTURES)
def codec_architecture(request: pytest.FixtureRequest) -> str:
    """Every name that the fixtures below know."""
    return request.param


@pytest.fixture
def tiny_config() -> Callable[..., CodecLMConfig]:
    """(name, **changes) -> configuration."""
    return _config


@pytest.fixture
def tiny_codec_lm() -> Callable[..., CodecLM]:
    """(name, dtype=, spread=, **changes) -> model moved off its initial weights by `spread`."""
    return _model


@pytest.fixture
def codec_tokens() -> Callable[..., torch.Tensor]:
    """(batch, steps, seed=) -> columns [B, 3, T]."""
    return _tokens
