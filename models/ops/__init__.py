"""Sequence operators in the [B, T, H, D] layout: a recurrent reference and fast twins behind one signature."""

from __future__ import annotations

from models.ops.gated_delta import gated_delta, gated_delta_step
from models.ops.linear_attention import (
    elu_feature_map,
    linear_attention,
    linear_attention_segments,
    linear_attention_step,
)
from models.ops.memory_cache import (
    memory_cache_retrieval,
    memory_cache_retrieval_step,
    segment_gate_logits,
)

__all__ = [
    "elu_feature_map",
    "gated_delta",
    "gated_delta_step",
    "linear_attention",
    "linear_attention_segments",
    "linear_attention_step",
    "memory_cache_retrieval",
    "memory_cache_retrieval_step",
    "segment_gate_logits",
]
