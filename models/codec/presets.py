"""Codec language models by name: four scales, and at each scale every architecture at the same parameter count.

Where the counts come from (d = d_model; norms of a block 2d, final norm d, SwiGLU 3 d d_ff; embeddings and untied
heads K * 1027 * d each; no biases unless said):

    speech_olmo_hybrid_a100_20m_ctx1024       d 384, K 8, d_ff 1024: 21,904,648
      embeddings + heads      2 * 8 * 1027 * 384                                             6,309,888
      6 Gated DeltaNet        q, k 2*384*288; v, gate, out 3*384*576; a, b 2*384*6;
                              conv 4*(288+288+576); A_log, dt_bias 2*6; head norm 96    6 *    894,060
      2 attention (4, 8)      q, out 2*384*384; k, v 2*384*128; head norms 2*64         2 *    393,344
      8 SwiGLU, norms         3*384*1024 + 2*384                                        8 *  1,180,416
      final norm                                                                                   384
    music_olmo_hybrid_300m_a100               d 1024, K 9, d_ff 2816: 294,263,072
      embeddings + heads      2 * 9 * 1027 * 1024                                           18,929,664
      17 deltanet_simple      q, k, v, out 4*1024^2; two gates 2*(1024*16+16);
                              head norms 2*64                                          17 *  4,227,232
      5 attention (4, ... 20) q, out 2*1024^2; k, v 2*1024*256; head norms 2*64          5 *  2,621,568
      22 SwiGLU, norms        3*1024*2816 + 2*1024                                      22 *  8,652,800
      final norm                                                                                 1,024
    music_gdn_hybrid_300m_a100                the same with the full mixer: 326,407,936
      16 Gated DeltaNet       16 heads of 48 / 96, as in speech                         16 *  6,336,640
      6 attention             4, 8, ... 20 and 22: this count is only met with the final layer attention

The published description of the memory-caching models leaves their shapes open. The shapes here are ours, chosen to
meet the published sizes and overheads (share of all parameters in W_u and the gate biases):

    mc_la_48m   d 576, 12 layers, 9 heads, d_ff 1008, K 9; caches in every layer, W_u of rank 88:
                48,705,996 parameters, overhead 12 * (2 * 576 * 88 + 1) = 1,216,524 = 2.498%
    mc_la_95m   d 768, 14 layers, 12 heads, d_ff 1392, K 9; caches from layer 10, full W_u:
                95,099,141 parameters, overhead 5 * (768^2 + 1) = 2,949,125 = 3.101%

`local` is a scale for a laptop, not from any study. At each scale the other architectures keep d_model, depth and
head count; only d_ff is solved for (`match_parameters`), so that what differs is the mixer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from models.codec.cost import lm_cost, match_parameters
from models.codec.model import CodecLMConfig, MixerName
from models.codec.text import TextConfig
from models.mixers.memory_cache import MemoryCacheConfig

SPEECH = CodecLMConfig(
    d_model=384,
    n_layers=8,
    n_heads=6,
    n_kv_heads=2,
    d_ff=1024,
    n_codebooks=8,
    context=1024,
    mixer="gated_delta",
    attention_every=4,
    force_final_attention=True,
)
MUSIC_FULL_MIXER = CodecLMConfig(
    d_model=1024,
    n_layers=22,
    n_heads=16,
    n_kv_heads=4,
    d_ff=2816,
    n_codebooks=9,
    context=2048,
    mixer="gated_delta",
    attention_every=4,
    force_final_attention=True,
)
MUSIC = replace(MUSIC_FULL_MIXER, mixer="deltanet_simple", force_final_attention=False)
MC_LA_48M = CodecLMConfig(
    d_model=576,
    n_layers=12,
    n_heads=9,
    n_kv_heads=3,
    d_ff=1008,
    n_codebooks=9,
    context=2048,
    mixer="linear_attention",
    memory_cache=MemoryCacheConfig(segment=256, rank=88),
)
MC_LA_95M = CodecLMConfig(
    d_model=768,
    n_layers=14,
    n_heads=12,
    n_kv_heads=4,
    d_ff=1392,
    n_codebooks=9,
    context=2048,
    mixer="linear_attention",
    memory_cache=MemoryCacheConfig(segment=128, start_layer=10),
)
LOCAL = CodecLMConfig(
    d_model=64,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    d_ff=176,
    n_codebooks=8,
    context=1024,
    mixer="gated_delta",
    attention_every=4,
    force_final_attention=True,
    head_k=16,
    head_v=32,
    d_state=16,
    mamba2_head=32,
)


MC_LA_SMALL = CodecLMConfig(
    d_model=48,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_ff=96,
    n_codebooks=4,
    codebook_size=256,
    context=512,
    mixer="linear_attention",
    memory_cache=MemoryCacheConfig(segment=64, rank=8),
)
MC_LA_LARGE = replace(MC_LA_SMALL, d_model=80, n_layers=4, d_ff=160)
MC_LA_RECALL = CodecLMConfig(
    d_model=32,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    d_ff=64,
    n_codebooks=2,
    codebook_size=17,
    context=64,
    mixer="linear_attention",
    memory_cache=MemoryCacheConfig(segment=8),
)
# sizes of the memory-caching study; the last three are for a laptop, not from any study
MC_LA_SIZES: Mapping[str, CodecLMConfig] = {
    "48m": MC_LA_48M,
    "95m": MC_LA_95M,
    "small": MC_LA_SMALL,
    "large": MC_LA_LARGE,
    "recall": MC_LA_RECALL,
}


@dataclass(frozen=True)
class Scale:
    """Configurations whose parameter count is a contract (the first is what the others are matched to), and the
    caching options of the architectures with memory caching. text: of the models that are given texts, where the scale
    has some."""

    fixed: Mapping[str, CodecLMConfig]
    memory_cache: MemoryCacheConfig
    text: TextConfig | None = None

    @property
    def reference(self) -> CodecLMConfig:
        """What the other architectures of the scale are matched to."""
        return next(iter(self.fixed.values()))


# a sentence of LJ Speech has at most 187 characters; the encoder and cross-attention take a sixth of the parameters
SPEECH_TEXT = TextConfig(width=192, n_layers=4, n_heads=6, d_ff=512, max_bytes=256, blocks=(2, 4, 6, 8))
LOCAL_TEXT = TextConfig(width=32, n_layers=2, n_heads=4, d_ff=64, max_bytes=128, blocks=(2, 4))

SCALES: dict[str, Scale] = {
    "speech": Scale({"olmo_hybrid": SPEECH}, MemoryCacheConfig(segment=128, rank=96), SPEECH_TEXT),
    "music": Scale({"olmo_hybrid": MUSIC, "gdn_hybrid": MUSIC_FULL_MIXER}, MemoryCacheConfig(segment=256, rank=256)),
    "48m": Scale({"mc_la": MC_LA_48M}, MemoryCacheConfig(segment=256, rank=88)),
    "95m": Scale({"mc_la": MC_LA_95M}, MemoryCacheConfig(segment=128, start_layer=10)),
    "local": Scale({"olmo_hybrid": LOCAL}, MemoryCacheConfig(segment=64, rank=16), LOCAL_TEXT),
}


@dataclass(frozen=True)
class Architecture:
    """What replaces the reference's mixers; attention keeps its grouped heads except in the pure transformer."""

    mixer: MixerName
    attention_every: int | None = None
    force_final_attention: bool = False
    cached: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "olmo_hybrid": Architecture("gated_delta", attention_every=4, force_final_attention=True),
    "gdn": Architecture("gated_delta"),
    "transformer": Architecture("attention"),
    "mamba": Architecture("mamba"),
    "mamba2": Architecture("mamba2"),
    "hybrid_1_3": Architecture("mamba", attention_every=4),
    "hybrid_1_7": Architecture("mamba", attention_every=8),
    "la": Architecture("linear_attention"),
    "mc_la": Architecture("linear_attention", cached=True),
    "mc_mamba": Architecture("mamba", cached=True),
}


def text_config(scale: str) -> TextConfig:
    """Text conditioning at a scale. Raises ValueError for an unknown scale, or one without."""
    text = _scale(scale).text
    if text is None:
        having = ", ".join(name for name, s in SCALES.items() if s.text is not None)
        raise ValueError(f"scale={scale!r} has no text conditioning; choose one of {having}")
    return text


def _scale(name: str) -> Scale:
    if name not in SCALES:
        raise ValueError(f"scale={name!r} is not one of {', '.join(SCALES)}; choose one of these")
    return SCALES[name]


def scale_config(scale: str, architecture: str, *, text: bool = False) -> CodecLMConfig:
    """The configuration of an architecture at a scale, d_ff solved so that parameters agree within 1%.

    text: with the scale's text conditioning, whose parameters the MLPs give up.
    Raises ValueError for an unknown scale or architecture, for a hybrid too deep for the scale's layers, when
    no d_ff matches, and for text at a scale without.
    """
    s = _scale(scale)
    conditioning = text_config(scale) if text else None
    if architecture in s.fixed:
        config = s.fixed[architecture]
        if conditioning is None:
            return config
    else:
        config = _replaced(s, scale, architecture)
    return match_parameters(replace(config, text=conditioning), lm_cost(s.reference).parameters)


def _replaced(s: Scale, scale: str, architecture: str) -> CodecLMConfig:
    """The scale's reference with an architecture's mixers in place of its own."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r} is not one of {', '.join(ARCHITECTURES)}; choose one of these")
    a, reference = ARCHITECTURES[architecture], s.reference
    if a.attention_every is not None and a.attention_every > reference.n_layers:
        raise ValueError(
            f"{architecture} has attention every {a.attention_every} layers, but scale {scale!r} has "
            f"{reference.n_layers}; choose a larger scale"
        )
    return replace(
        reference,
        mixer=a.mixer,
        attention_every=a.attention_every,
        force_final_attention=a.force_final_attention,
        memory_cache=s.memory_cache if a.cached else None,
        n_kv_heads=reference.n_heads if a.mixer == "attention" else reference.n_kv_heads,
    )
