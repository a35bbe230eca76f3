"""Sequence operators in the [B, T, H, D] layout: a recurrent reference and fast twins behind one signature."""

from __future__ import annotations

from models.ops.convolution import short_conv, short_conv_step
from models.ops.delta_rule import gated_delta, gated_delta_step
from models.ops.linear import (
    elu_feature_map,
    linear_attention,
    linear_attention_segments,
    linear_attention_step,
)
from models.ops.mamba1 import selective_scan, selective_scan_step
from models.ops.mamba2 import ssd, ssd_step
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
    "selective_scan",
    "selective_scan_step",
    "short_conv",
    "short_conv_step",
    "ssd",
    "ssd_step",
]
