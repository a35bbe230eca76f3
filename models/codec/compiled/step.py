"""The step of a codec language model on a CPU, block by block in compiled kernels.

The weights are packed once per sample; the residual stream, the states and all scratch live in preallocated arrays. A
mixer without a kernel takes its own step in torch between the compiled parts, and so does cross-attention to a text.

Shapes: B batch, K codebooks, V vocabulary, D model width, F hidden width of the MLP, C convolved channels, P positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.codec.compiled import kernels
from models.codec.compiled.products import pack, padded, panels_of
from models.codec.model import Block, CodecLM, DecodeState
from models.codec.text import TextKeys
from models.mixers.attention import Attention, KVCache
from models.mixers.gated_delta import GatedDeltaNet, GatedDeltaState

Floats = npt.NDArray[np.float32]


class CompiledStep:
    """`CodecLM.step` in float32 with weights in float32 or bfloat16, for a model whose parameters are float32.

    Activations and states stay float32 in either case, where an autocast region would round them to bfloat16 too.
    The model's parameters must not change between construction and the last call; those of `torch_parts`, the mixers
    without a kernel and cross-attention to a text, are read anew in each call.
    """

    def __init__(self, model: CodecLM, state: DecodeState, batch: int, weights: torch.dtype) -> None:
        config = model.config
        self.length, self.max_steps = state.length, state.max_steps
        K, V, D = model.heads.shape
        self._x_BD = _zeros(batch, padded(D))
        self._table_KVD = _floats(model.embedding)
        self.layers: list[Any] = []
        self._parts: list[Callable[[], None]] = []
        room = _Scratch(batch, padded(D), np.float32(config.norm_eps), weights)
        self.torch_parts = nn.ModuleList()
        for block, layer, keys in zip(model.blocks, state.layers, state.keys, strict=True):
            assert isinstance(block, Block)
            mixer = _COMPILED.get(type(block.mixer), _TorchMixer)(block, layer, self._x_BD, room)
            self.layers.append(mixer)
            self._parts.append(mixer)
            if isinstance(mixer, _TorchMixer):
                self.torch_parts.append(block.mixer)
            if block.cross is not None and keys is not None:
                self.torch_parts.append(block.cross)
                self._parts.append(_Cross(block, keys, self._x_BD))
            self._parts.append(_SwiGLU(block, self._x_BD, room))
        out_BN = _zeros(batch, padded(K * V))
        heads = pack([model.heads.detach().view(K * V, D)], weights)
        self._head = (self._x_BD, _floats(model.norm.weight), room.eps, heads, room.normed_BD, out_BN)
        self._logits_BKV = torch.from_numpy(out_BN)[:, : K * V].unflatten(1, (K, V))

    def __call__(self, tokens_BK: Tensor) -> Tensor:
        """Read one column [B, K] of tokens below V: logits [B, K, V] for the next, valid until the next call.

        Raises ValueError when the state is full.
        """
        if self.length >= self.max_steps:
            raise ValueError(f"step {self.length + 1} exceeds max_steps={self.max_steps}; prefill with more")
        kernels.embed(self._table_KVD, np.ascontiguousarray(tokens_BK.numpy()), self._x_BD)
        for part in self._parts:
            part()
        kernels.head_logits(*self._head)
        self.length += 1
        return self._logits_BKV


class _Scratch:
    """What all layers share: sizes, the norms' epsilon, the weights' precision and the normed residual stream."""

    def __init__(self, batch: int, width: int, eps: np.float32, weights: torch.dtype) -> None:
        self.batch, self.eps, self.weights = batch, eps, weights
        self.normed_BD = _zeros(batch, width)


class _SwiGLU:
    """Second half of a block."""

    def __init__(self, block: Block, x_BD: Floats, room: _Scratch) -> None:
        mlp = block.mlp
        gate_up, down = pack(mlp.gate_up.weight.split(mlp.gate_up.sizes), room.weights), [mlp.down.weight]
        gated_BF = _zeros(room.batch, padded(mlp.gate_up.sizes[0]))
        hidden_BN = _zeros(room.batch, max(2 * gated_BF.shape[1], x_BD.shape[1]))
        self._arguments = (
            x_BD, _floats(block.mlp_norm.weight), room.eps, gate_up, pack(down, room.weights),
            room.normed_BD, hidden_BN, gated_BF,
        )  # fmt: skip

    def __call__(self) -> None:
        kernels.swiglu_block(*self._arguments)


class _TorchMixer:
    """First half of a block, for mixers without a kernel."""

    def __init__(self, block: Block, state: Any, x_BD: Floats, room: _Scratch) -> None:
        self.block, self.state = block, state
        self._x_BD = torch.from_numpy(x_BD)[:, : block.mixer_norm.weight.shape[0]]

    def __call__(self) -> None:
        y_BD, self.state = self.block.mixer.step(self.block.mixer_norm(self._x_BD), self.state)
        self._x_BD += y_BD


class _Cross:
    """Between the two halves of a block: cross-attention to the text, in torch."""

    def __init__(self, block: Block, keys: TextKeys, x_BD: Floats) -> None:
        self._norm, self._cross, self._keys = block.cross_norm, block.cross, keys
        self._x_B1D = torch.from_numpy(x_BD)[:, None, : block.cross_norm.weight.shape[0]]

    def __call__(self) -> None:
        assert self._cross is not None
        self._x_B1D += self._cross(self._norm(self._x_B1D), self._keys)


class _GatedDelta:
    """First half of a block with Gated DeltaNet: its memory [B, H, K, V] and the convolution's past [B, W-1, C]."""

    def __init__(self, block: Block, state: GatedDeltaState, x_BD: Floats, room: _Scratch) -> None:
        mixer = block.mixer
        assert isinstance(mixer, GatedDeltaNet)
        assert state.conv is not None
        channels, values = sum(mixer.qkv_sizes), mixer.qkv_sizes[2]
        parts = mixer.in_proj.weight.split((channels, values, 2 * mixer.n_heads))
        self.memory_BHKV, self.past_BWC = _copied(state.memory), _copied(state.conv)
        projected = sum(padded(len(part)) for part in parts)
        self._arguments = (
            x_BD, _floats(block.mixer_norm.weight), room.eps, pack(parts, room.weights),
            _floats(mixer.conv_weight.t()), _floats(mixer.A_log.exp()), _floats(mixer.dt_bias),
            _floats(mixer.norm.norm.weight), pack([mixer.out.weight], room.weights), self.past_BWC, self.memory_BHKV,
            room.normed_BD, _zeros(room.batch, max(projected, x_BD.shape[1])), _zeros(1, channels)[0],
            _zeros(room.batch, padded(values)), _zeros(1, mixer.head_v)[0],
        )  # fmt: skip

    def __call__(self) -> None:
        kernels.gated_delta_block(*self._arguments)


class _Attention:
    """First half of a block with attention: keys and values in panels [B, h, P/16, E, 16] and [B, h, E/16, P, 16]."""

    def __init__(self, block: Block, state: KVCache, x_BD: Floats, room: _Scratch) -> None:
        mixer = block.mixer
        assert isinstance(mixer, Attention)
        positions, width = padded(state.k.shape[2]), padded(mixer.width)
        self.keys = panels_of(_enlarged(state.k, positions, width)).numpy()
        self.values = panels_of(_enlarged(state.v, positions, width).transpose(2, 3)).numpy()
        self.length = state.length
        shared, weight = mixer.n_heads // mixer.n_kv_heads, mixer.qkv.weight
        self._arguments = (
            x_BD, _floats(block.mixer_norm.weight), room.eps, pack([weight], room.weights),
            _floats(mixer.q_norm.weight), _floats(mixer.k_norm.weight), pack([mixer.out.weight], room.weights),
            _floats(state.cos), _floats(state.sin), self.keys, self.values,
        )  # fmt: skip
        self._scratch = (
            room.normed_BD, _zeros(room.batch, max(padded(len(weight)), x_BD.shape[1])), _zeros(shared, width),
            _zeros(1, width)[0], _zeros(shared, positions), _zeros(shared, width), _zeros(*x_BD.shape),
        )  # fmt: skip

    def __call__(self) -> None:
        kernels.attention_block(*self._arguments, self.length, *self._scratch)
        self.length += 1


_COMPILED: dict[type[nn.Module], Callable[..., Any]] = {GatedDeltaNet: _GatedDelta, Attention: _Attention}


def _zeros(rows: int, columns: int) -> Floats:
    return np.zeros((rows, columns), np.float32)


def _floats(tensor: Tensor) -> Floats:
    """Contiguous float32; shares the tensor's memory where that is so already."""
    return tensor.detach().float().contiguous().numpy()


def _copied(tensor: Tensor) -> Floats:
    """A contiguous float32 copy."""
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format).numpy()


def _enlarged(tensor_BhPE: Tensor, positions: int, width: int) -> Tensor:
    """float32 [B, h, positions, width], zeros where the tensor has nothing."""
    _, _, P, E = tensor_BhPE.shape
    return F.pad(tensor_BhPE.detach().float(), (0, width - E, 0, positions - P))
