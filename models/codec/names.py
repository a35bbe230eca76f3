"""Codec language models by the name of their preset."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from models.codec.model import CodecLM, CodecLMConfig
# name → (scale, architecture) of models.codec.presets, where the shapes and parameter counts are
_MATCHED = ("gdn", "transformer", "mamba", "mamba2", "hybrid_1_3", "hybrid_1_7", "la", "mc_la", "mc_mamba")
CODEC_LMS: dict[str, tuple[str, str]] = {
    **{f"speech_{a}_a100_20m_ctx1024": ("speech", a) for a in ("olmo_hybrid", *_MATCHED)},
    **{f"music_{a}_300m_a100": ("music", a) for a in ("olmo_hybrid", "gdn_hybrid", *_MATCHED)},
    **{f"{a}_48m": ("48m", a) for a in ("olmo_hybrid", *_MATCHED)},
    **{f"{a}_95m": ("95m", a) for a in ("olmo_hybrid", *_MATCHED)},
    **{f"local_{a}": ("local", a) for a in ("olmo_hybrid", *_MATCHED) if a != "hybrid_1_7"},  # 4 layers: no 1:7
}


def lm_config(preset: str) -> CodecLMConfig:
    """Configuration of a codec language model. Raises ValueError for an unknown preset."""
    from models.codec.presets import scale_config

    if preset not in CODEC_LMS:
        raise ValueError(f"preset={preset!r} is not one of {', '.join(CODEC_LMS)}; choose one of these")
    return scale_config(*CODEC_LMS[preset])


def build_lm(preset: str, *, device: torch.device | str = "cpu", seed: int = 0) -> CodecLM:
    """A codec language model with initial weights from `seed`; device="meta" allocates nothing.

    Raises ValueError for an unknown preset.
    """
    from models.codec.model import build_codec_lm

    return build_codec_lm(lm_config(preset), device=device, seed=seed)
