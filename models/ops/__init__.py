"""Sequence operators in the [B, T, H, D] layout: a recurrent reference and fast twins behind one signature."""

from __future__ import annotations

from models.ops.gated_delta import gated_delta, gated_delta_step

__all__ = ["gated_delta", "gated_delta_step"]
