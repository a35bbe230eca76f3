"""Language models over residual-vector-quantised audio tokens, one column of K codebooks a step.

input: sum over codebooks of their embeddings; blocks: x + mixer(norm(x)), x + SwiGLU(norm(x)); output: K linear heads.
With text conditioning, chosen blocks add x + cross_attention(norm(x), text) between the two.

Shapes: B batch, K codebooks, T steps, D model width, V vocabulary per codebook (codes, then pad, BOS, EOS).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.codec.cache_health import GateSums, gate_sums
from models.codec.loss import CodebookLoss, check_tokens, codebook_loss
from models.codec.text import CrossAttention, TextConfig, TextEncoder, TextKeys, Texts, no_texts
from models.cpu.bfloat16 import linear
from models.mixers.attention import Attention
from models.mixers.base import FusedLinear, Mixer, ResidualDropout, RMSNorm, SwiGLU
from models.mixers.gated_delta import GatedDeltaNet, SimpleDeltaNet
from models.mixers.linear_attention import LinearAttention
from models.mixers.mamba import Mamba, Mamba2
from models.mixers.memory_cache import CachedLinearAttention, CachedMixer, CachedOutput, MemoryCacheConfig

MixerName = Literal["attention", "gated_delta", "deltanet_simple", "linear_attention", "mamba", "mamba2"]
MIXERS: tuple[MixerName, ...] = (
    "attention",
    "gated_delta",
    "deltanet_simple",
    "linear_attention",
    "mamba",
    "mamba2",
)


@dataclass(frozen=True, kw_only=True)
class CodecLMConfig:
    """Everything that decides the function a model can compute and its parameter count.

    mixer: of the layers that are not attention. attention_every: every n-th layer (counted from 1) is attention,
    None for no attention; force_final_attention makes the last layer attention too. head_k, head_v: widths of a
    Gated DeltaNet head. delta_rule: of linear attention. d_state, expand, mamba2_head: of the two Mambas.
    impl: kernel of the mixers (see models.ops); it changes speed, not the function. text: conditioning on texts.
    dropout: share of what each mixer, cross-attention and MLP adds that is dropped in training.
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    n_codebooks: int
    context: int
    mixer: MixerName
    attention_every: int | None = None
    force_final_attention: bool = False
    codebook_size: int = 1024
    head_k: int = 48
    head_v: int = 96
    conv_width: int = 4
    delta_rule: bool = False
    d_state: int = 64
    expand: int = 2
    mamba2_head: int = 64
    memory_cache: MemoryCacheConfig | None = None
    rope_base: float = 500_000.0
    norm_eps: float = 1e-6
    impl: str = "auto"
    text: TextConfig | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in 0..1, below 1; 0.1 drops a tenth")
        for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "n_codebooks", "context", "codebook_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; choose {name} >= 1")
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer={self.mixer!r} is not one of {', '.join(MIXERS)}; choose one of these")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model={self.d_model} does not split into {self.n_heads} heads of even width (rotary pairs); "
                f"choose d_model a multiple of {2 * self.n_heads}"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if "mamba2" in self.mixers and self.expand * self.d_model % self.mamba2_head:
            raise ValueError(
                f"inner width {self.expand * self.d_model} does not split into heads of mamba2_head={self.mamba2_head}"
            )
        cache = self.memory_cache
        if cache is not None and cache.start_layer > self.n_layers:
            raise ValueError(
                f"start_layer={cache.start_layer} exceeds n_layers={self.n_layers}, so no layer would cache; "
                f"choose start_layer <= {self.n_layers}"
            )
        if self.text is not None:
            self.text.check_blocks(self.n_layers)

    @property
    def mixers(self) -> tuple[MixerName, ...]:
        """Mixer of each layer."""

        def of(layer: int) -> MixerName:
            every = self.attention_every is not None and layer % self.attention_every == 0
            return "attention" if every or (self.force_final_attention and layer == self.n_layers) else self.mixer

        return tuple(of(layer) for layer in range(1, self.n_layers + 1))

    @property
    def max_frames(self) -> int:
        """Frames that the context holds: the delay pattern adds a column for each codebook but the first."""
        return self.context - self.n_codebooks + 1

    @property
    def vocabulary(self) -> int:
        """Tokens per codebook: its codes, pad, bos, and the published vocabulary's end of a clip, which stays unused.

        Clips are pieces of recordings, so that their ends mean nothing.
        """
        return self.codebook_size + 3

    @property
    def pad(self) -> int:
        """Fills vacated places of the delay pattern and the ends of short clips; never a target."""
        return self.codebook_size

    @property
    def bos(self) -> int:
        """First input column."""
        return self.codebook_size + 1


def config_facts(config: CodecLMConfig) -> dict[str, Any]:
    """The configuration as JSON values, as checkpoints hold it; what a model does without they do not mention."""
    facts = asdict(config)
    if config.text is None:
        del facts["text"]
    if not config.dropout:
        del facts["dropout"]
    return facts


def config_of(facts: Mapping[str, Any]) -> CodecLMConfig:
    """The inverse of `config_facts`. Raises TypeError for unknown or missing fields, ValueError for bad values."""
    own = dict(facts)
    if own.get("memory_cache") is not None:
        own["memory_cache"] = MemoryCacheConfig(**own["memory_cache"])
    if own.get("text") is not None:
        own["text"] = TextConfig(**{**own["text"], "blocks": tuple(own["text"]["blocks"])})
    return CodecLMConfig(**own)


def build_mixer(config: CodecLMConfig, layer: int) -> Mixer:
    """Mixer of a layer (counted from 1), with memory caching where the configuration asks for it."""
    c, name = config, config.mixers[layer - 1]
    if name == "attention":
        return Attention(c.d_model, c.n_heads, c.n_kv_heads, rope_base=c.rope_base, norm_eps=c.norm_eps)
    mixer: Mixer
    if name == "gated_delta":
        mixer = GatedDeltaNet(
            c.d_model, c.n_heads, c.head_k, c.head_v, conv_width=c.conv_width, norm_eps=c.norm_eps, impl=c.impl
        )
    elif name == "deltanet_simple":
        mixer = SimpleDeltaNet(c.d_model, c.n_heads, norm_eps=c.norm_eps, impl=c.impl)
    elif name == "linear_attention":
        mixer = LinearAttention(c.d_model, c.n_heads, delta_rule=c.delta_rule, impl=c.impl)
    elif name == "mamba":
        mixer = Mamba(c.d_model, d_state=c.d_state, expand=c.expand, conv_width=c.conv_width, impl=c.impl)
    else:
        mixer = Mamba2(
            c.d_model,
            d_state=c.d_state,
            expand=c.expand,
            head_width=c.mamba2_head,
            conv_width=c.conv_width,
            norm_eps=c.norm_eps,
            impl=c.impl,
        )
    if c.memory_cache is None or layer < c.memory_cache.start_layer:
        return mixer
    if isinstance(mixer, LinearAttention):
        return CachedLinearAttention(mixer, c.d_model, c.memory_cache)
    return CachedOutput(mixer, c.d_model, c.memory_cache)


def _whole(x: Tensor) -> Tensor:
    return x


class Block(nn.Module):
    """x + mixer(norm(x)), in some x + cross_attention(norm(x), text), then x + SwiGLU(norm(x)).

    In training each of the three terms goes through dropout, where the configuration has some.
    keys: of the text, see `CodecLM.text_keys`; None in a block without cross-attention.
    """

    def __init__(self, config: CodecLMConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = build_mixer(config, layer)
        self.cross: CrossAttention | None = None
        if config.text is not None and layer in config.text.blocks:
            self.cross_norm = RMSNorm(config.d_model, eps=config.norm_eps)
            self.cross = CrossAttention(config.d_model, config.text.width, config.n_heads, norm_eps=config.norm_eps)
        self.mlp_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = SwiGLU(config.d_model, config.d_ff)
        self.dropout = ResidualDropout(config.dropout)

    def _after_mixer(self, x_BTD: Tensor, keys: TextKeys | None, drop: Callable[[Tensor], Tensor] = _whole) -> Tensor:
        if self.cross is not None:
            assert keys is not None
            x_BTD = x_BTD + drop(self.cross(self.cross_norm(x_BTD), keys))
        return x_BTD + drop(self.mlp(self.mlp_norm(x_BTD)))

    def forward(self, x_BTD: Tensor, keys: TextKeys | None = None) -> Tensor:
        return self._after_mixer(x_BTD + self.dropout(self.mixer(self.mixer_norm(x_BTD))), keys, self.dropout)

    def prefill(self, x_BTD: Tensor, max_steps: int, keys: TextKeys | None = None) -> tuple[Tensor, Any]:
        y, state = self.mixer.prefill(self.mixer_norm(x_BTD), max_steps)
        return self._after_mixer(x_BTD + y, keys), state

    def step(self, x_BD: Tensor, state: Any, keys: TextKeys | None = None) -> tuple[Tensor, Any]:
        y, state = self.mixer.step(self.mixer_norm(x_BD), state)
        if self.cross is None:
            return self._after_mixer(x_BD + y, None), state
        return self._after_mixer((x_BD + y)[:, None], keys)[:, 0], state


@dataclass
class DecodeState:
    """State of every layer after `length` steps, with room for `max_steps`, and its keys of the text."""

    layers: list[Any]
    length: int
    max_steps: int
    keys: list[TextKeys | None]


class CodecLM(nn.Module):
    """Decoder over [B, K, T] token columns (delayed or not: the model does not know)."""

    def __init__(self, config: CodecLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.n_codebooks, config.vocabulary, config.d_model))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(1, config.n_layers + 1))
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.heads = nn.Parameter(torch.empty(config.n_codebooks, config.vocabulary, config.d_model))
        self.text_encoder: TextEncoder | None = None
        if config.text is not None:
            self.text_encoder = TextEncoder(config.text, rope_base=config.rope_base, norm_eps=config.norm_eps)

    def init_weights(self, generator: torch.Generator) -> None:
        """Embeddings N(0, 0.02), Glorot projections, those that write to the residual times 1 / sqrt(2 layers).

        Bytes N(0, 1): nothing but their own embedding distinguishes the symbols of a text.
        """
        nn.init.normal_(self.embedding, std=0.02, generator=generator)
        for head in self.heads:
            nn.init.xavier_uniform_(head, generator=generator)
        for module in self.modules():
            if isinstance(module, FusedLinear):
                module.init_weights(generator)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for module in self.modules():
            if isinstance(module, Mixer):
                module.init_own_parameters(generator)
        layers = {"text_encoder": 0, "blocks": self.config.n_layers}
        if self.text_encoder is not None and self.config.text is not None:
            nn.init.normal_(self.text_encoder.embedding, generator=generator)
            layers["text_encoder"] = self.config.text.n_layers
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(("out.weight", "mlp.down.weight")):
                    parameter.mul_(1 / math.sqrt(2 * layers[name.split(".")[0]]))

    def seed_dropout(self, seeds_B: Sequence[int]) -> None:
        """Draw the dropout of the next forward pass from a stream for each of its clips; with none, from global state.

        seeds_B: 64-bit numbers. Nothing happens in a model without dropout.
        """
        if not self.config.dropout:
            return
        streams = [torch.Generator(self.heads.device).manual_seed(seed) for seed in seeds_B]
        for block in self.blocks:
            assert isinstance(block, Block)
            block.dropout.streams = streams

    def embed(self, tokens_BKT: Tensor) -> Tensor:
        """[B, K, T] tokens -> [B, T, D]. Raises ValueError for a wrong K or a token outside the vocabulary."""
        K, V, D = self.embedding.shape
        if tokens_BKT.dim() != 3 or tokens_BKT.shape[1] != K:
            raise ValueError(f"tokens have shape {tuple(tokens_BKT.shape)}, expected [B, K, T] with K={K} codebooks")
        check_tokens(tokens_BKT, V)
        B, _, T = tokens_BKT.shape
        rows = tokens_BKT.long() + V * torch.arange(K, device=tokens_BKT.device)[:, None]
        rows_NK = rows.transpose(1, 2).reshape(B * T, K)
        return F.embedding_bag(rows_NK, self.embedding.view(K * V, D), mode="sum").view(B, T, D)

    def text_keys(self, texts: Texts | None, batch: int) -> list[TextKeys | None]:
        """Keys and values of `batch` texts for each block, None where it has no cross-attention.

        texts: None for clips without a text. Raises ValueError for texts without an encoder, or another number of them.
        """
        if self.text_encoder is None:
            if texts is not None:
                raise ValueError("texts were given to a model without a text encoder; give none, or set config.text")
            return [None] * len(self.blocks)
        texts = no_texts(batch, self.heads.device) if texts is None else texts
        if len(texts.length_B) != batch:
            raise ValueError(f"{len(texts.length_B)} texts were given for {batch} clips; give one per clip")
        memory = self.text_encoder(texts)
        crosses = [block.cross for block in self.blocks]
        return [cross.keys(memory) if isinstance(cross, CrossAttention) else None for cross in crosses]

    def decode_embedded(self, x_BTD: Tensor, texts: Texts | None = None) -> Tensor:
        """Embedded steps -> hidden states [B, T, D] after the final norm; texts as in `text_keys`."""
        for block, keys in zip(self.blocks, self.text_keys(texts, len(x_BTD)), strict=True):
            x_BTD = block(x_BTD, keys)
        return self.norm(x_BTD)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., K, V]."""
        K, V, D = self.heads.shape
        return linear(hidden, self.heads.view(K * V, D)).unflatten(-1, (K, V))

    def forward(self, tokens_BKT: Tensor, texts: Texts | None = None) -> Tensor:
        """[B, K, T] tokens -> logits [B, T, K, V] for the column after each step; texts as in `text_keys`."""
        return self.logits(self.decode_embedded(self.embed(tokens_BKT), texts))

    def loss(
        self,
        inputs_BKT: Tensor,
        targets_BKT: Tensor,
        texts: Texts | None = None,
        *,
        label_smoothing: float = 0.1,
        accuracy: bool = False,
    ) -> CodebookLoss:
        """Loss over targets that are not pad (see `codebook_loss`), without materialising the logits."""
        hidden = self.decode_embedded(self.embed(inputs_BKT), texts)
        return codebook_loss(
            hidden, self.heads, targets_BKT, pad=self.config.pad, label_smoothing=label_smoothing, accuracy=accuracy
        )

    @torch.no_grad()
    def prefill(self, tokens_BKT: Tensor, max_steps: int, texts: Texts | None = None) -> tuple[Tensor, DecodeState]:
        """Read T >= 1 columns at once: logits [B, K, V] for the next, and a state with room for `max_steps` in all.

        Raises ValueError when T exceeds max_steps, and as `text_keys` does.
        """
        T = tokens_BKT.shape[-1]
        if max_steps < T:
            raise ValueError(f"{T} steps exceed max_steps={max_steps}; choose a larger max_steps")
        x, layers, keys = self.embed(tokens_BKT), [], self.text_keys(texts, len(tokens_BKT))
        for block, own in zip(self.blocks, keys, strict=True):
            x, state = block.prefill(x, max_steps, own)  # type: ignore[operator]
            layers.append(state)
        return self.logits(self.norm(x[:, -1])), DecodeState(layers, T, max_steps, keys)

    @torch.no_grad()
    def step(self, tokens_BK: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState]:
        """Read one column [B, K]: logits [B, K, V] for the next. The given state is used up.

        Raises ValueError when the state is full.
        """
        if state.length >= state.max_steps:
            raise ValueError(f"step {state.length + 1} exceeds max_steps={state.max_steps}; prefill with more")
        x = self.embed(tokens_BK[..., None]).squeeze(1)
        for i, block in enumerate(self.blocks):
            x, state.layers[i] = block.step(x, state.layers[i], state.keys[i])  # type: ignore[operator]
        state.length += 1
        return self.logits(self.norm(x)), state

    @torch.no_grad()
    def gate_sums(
        self, tokens_BKT: Tensor, length_B: Tensor | None = None, texts: Texts | None = None
    ) -> list[GateSums]:
        """Use of the caches by each layer with memory caching and each clip of `length_B` real steps (all of T)."""
        sums, x, keys = [], self.embed(tokens_BKT), self.text_keys(texts, len(tokens_BKT))
        for layer, (block, own) in enumerate(zip(self.blocks, keys, strict=True), start=1):
            assert isinstance(block, Block)
            if isinstance(block.mixer, CachedMixer):
                sums.append(gate_sums(layer, block.mixer, block.mixer_norm(x), length_B))
            x = block(x, own)
        return sums


def build_codec_lm(config: CodecLMConfig, *, device: torch.device | str = "cpu", seed: int = 0) -> CodecLM:
    """A model with the same initial weights on every device (drawn on the CPU from `seed`), float32.

    On the meta device nothing is allocated or initialised.
    """
    with torch.device("meta"):
        model = CodecLM(config)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.to(device)
