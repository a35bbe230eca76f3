"""The language model under study: activations at a hook, their gradients, and the loss with a patch.

Shape suffixes: B sequences, T tokens, D d_model, V vocabulary. Hooks are TransformerLens names,
``blocks.{L}.hook_resid_post``: the residual stream after block L. Weights are used unprocessed (no folding of
norms, no centring). The trunk is the Hugging Face model itself, cut into segments of blocks, which TransformerLens'
TransformerBridge equals bit for bit (a test holds it) and which can start and stop at any block.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.host import weights
from models.host.next_token_loss import NextTokenLoss
from models.host.specs import HOST_LMS, HostLMSpec
from models.host.weights import Corpus, LMUnavailable

__all__ = [
    "Corpus",
    "HostLM",
    "LMUnavailable",
    "check_checkpoint",
    "check_layer",
    "host_lm_spec",
    "lm_flops_per_token",
    "load_host_lm",
]


class HostLM:
    """One frozen causal LM, cut at its hooks. Build it with `load_host_lm`.

    Activations, gradients and losses are float32 whatever ``dtype`` the trunk runs in.
    """

    def __init__(self, name: str, model: nn.Module, spec: HostLMSpec, tokenizer_dir: Path | None) -> None:
        self.name = name
        self.spec = spec
        self.d_model, self.n_layers, self.d_vocab = spec.d_model, spec.n_layers, spec.d_vocab
        self.tokenizer_dir = tokenizer_dir
        self.model = model.eval().requires_grad_(False)
        self._base: Any = model.base_model
        self._norm_name = "final_layer_norm" if spec.architecture == "gpt_neox" else "norm"
        self._head = NextTokenLoss(model.get_output_embeddings())  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def hook_name(self, layer: int) -> str:
        """TransformerLens' name of the residual stream after block ``layer`` (0-based)."""
        return f"blocks.{check_layer(self.name, layer, self.n_layers)}.hook_resid_post"

    @torch.no_grad()
    def activations(self, tokens_BT: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Residual stream after each of ``layers``, {layer: a_BTD}; no block above the deepest one runs."""
        return {layer: a_BTD.float() for layer, a_BTD in self._climb(tokens_BT, self._checked(layers))}

    def loss_and_gradients(
        self,
        tokens_BT: Tensor,
        layers: Sequence[int],
        *,
        also: Sequence[int] = (),
        logits_dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
        """One forward and one backward of the unpatched model, shared by all ``layers``.

        Returns (loss_B, {layer: a_BTD}, {layer: g_BTD}) with loss_B each sequence's mean next-token cross-entropy over
        its T−1 predictions, in nats, and g = ∂L/∂a, L the SUM of these cross-entropies. So gᵀδ at a token is the
        first-order change, in nats, of the whole sequence's loss when that token's activation moves by δ, independent
        of B; divide g by T−1 for the gradient of the mean loss. The same pass gives the activations, without
        gradients, of the layers in ``also``.
        """
        wanted = self._checked(layers)
        stops = self._checked([*layers, *also])
        seen: dict[int, Tensor] = {}
        with torch.no_grad():
            for layer, a_BTD in self._climb(tokens_BT, [s for s in stops if s <= wanted[0]]):
                seen[layer] = a_BTD.detach()
        with torch.enable_grad():
            seen[wanted[0]].requires_grad_(True)
            for below, layer in pairwise([s for s in stops if s >= wanted[0]]):
                seen[layer] = self._segment(below + 1, layer + 1)(inputs_embeds=seen[below])
            top = self._segment(stops[-1] + 1, self.n_layers, norm=True)
            sum_B = self._head(top(inputs_embeds=seen[stops[-1]]), tokens_BT, logits_dtype=logits_dtype)
            gradients = torch.autograd.grad(sum_B.sum(), [seen[layer] for layer in wanted])
        activations = {layer: a.detach().float() for layer, a in seen.items()}
        loss_B = sum_B.detach() / (tokens_BT.shape[1] - 1)
        return loss_B, activations, {layer: g.float() for layer, g in zip(wanted, gradients, strict=True)}

    @torch.no_grad()
    def patched_loss(
        self, a_BTD: Tensor, layer: int, tokens_BT: Tensor, *, logits_dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The mean losses [B] with the residual stream after block ``layer`` replaced by ``a_BTD``.

        Only later blocks run. B is free: stack several cells' reconstructions (and repeat the tokens) to run them in
        one pass. The zero-ablated loss is that of zeros; `zero_loss` gives it for the price of one token.
        """
        check_layer(self.name, layer, self.n_layers)
        hidden_BTD = self._segment(layer + 1, self.n_layers, norm=True)(inputs_embeds=a_BTD.to(self.dtype))
        return self._mean_loss(hidden_BTD, tokens_BT, logits_dtype)

    @torch.no_grad()
    def zero_loss(self, layer: int, tokens_BT: Tensor) -> Tensor:
        """`patched_loss` of zeros, [B]: with the hook zero everywhere all positions stay equal, so one is computed.

        (Causal attention over equal values returns that value whatever its weights; position enters both
        architectures through those weights alone.)
        """
        check_layer(self.name, layer, self.n_layers)
        zero_11D = torch.zeros(1, 1, self.d_model, device=self.device, dtype=self.dtype)
        hidden_11D = self._segment(layer + 1, self.n_layers, norm=True)(inputs_embeds=zero_11D)
        return self._head.of_constant(hidden_11D[0, 0], tokens_BT) / (tokens_BT.shape[1] - 1)

    def _mean_loss(self, hidden_BTD: Tensor, tokens_BT: Tensor, logits_dtype: torch.dtype) -> Tensor:
        return self._head(hidden_BTD, tokens_BT, logits_dtype=logits_dtype) / (tokens_BT.shape[1] - 1)

    def _checked(self, layers: Sequence[int]) -> list[int]:
        if not layers:
            raise ValueError("layers=[] asks for no activation; name at least one layer")
        return sorted({check_layer(self.name, layer, self.n_layers) for layer in layers})

    def _climb(self, tokens_BT: Tensor, layers: list[int]) -> Iterator[tuple[int, Tensor]]:
        inputs = {"input_ids": tokens_BT}
        for start, stop in pairwise([0, *(layer + 1 for layer in layers)]):
            a_BTD = self._segment(start, stop)(**inputs)
            yield stop - 1, a_BTD
            inputs = {"inputs_embeds": a_BTD}

    def _segment(self, start: int, stop: int, *, norm: bool = False) -> Callable[..., Tensor]:
        """Blocks start..stop−1 as a function of ``input_ids`` or ``inputs_embeds`` (shares the weights)."""
        part = copy.copy(self._base)
        part._modules = dict(self._base._modules)
        part._modules["layers"] = self._base.layers[start:stop]
        if not norm:
            part._modules[self._norm_name] = nn.Identity()
        return lambda **inputs: part(**inputs, use_cache=False).last_hidden_state


def load_host_lm(
    name: str,
    *,
    lm_path: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_dir: str | Path | None = None,
    corpus: Corpus | None = None,
    revision: str | None = None,
) -> HostLM:
    """The LM called ``name`` (a key of `models.host.specs.HOST_LMS`), frozen, in evaluation mode.

    ``lm_path`` reads a directory in Hugging Face format instead: the directory itself, or its sub-directory
    called ``name``; a ``name`` outside the table is then free. Its sizes must be those of ``name``.
    ``cache_dir`` (default $PLUMBLINE_CACHE, else ~/.cache/plumbline) keeps dequantised and stand-in weights.
    ``corpus`` is needed by the stand-ins alone, which are pretrained on it when not cached.
    ``revision`` is the commit (or branch) of a model on the hub, ``main`` when not given.

    Raises ValueError for an unknown name, sizes that disagree, files that cannot be read or tensors that are missing,
    left over or of another shape; LMUnavailable without network.
    """
    if lm_path is None:
        host_lm_spec(name)
    directory, spec = weights.locate(name, lm_path=lm_path, cache_dir=cache_dir, corpus=corpus)
    model = weights.read(name, directory, spec, revision)
    tokenizer = Path(directory) if (Path(directory) / "tokenizer.json").exists() else None
    return HostLM(name, model.to(device=device, dtype=dtype), spec, tokenizer)


def host_lm_spec(name: str, lm_path: str | Path | None = None) -> HostLMSpec:
    """Sizes and depths of ``name`` without loading weights; with ``lm_path`` from its config.json."""
    if lm_path is not None:
        return weights.directory_spec(name, weights.directory_of(name, lm_path))
    if name not in HOST_LMS:
        near = difflib.get_close_matches(name, HOST_LMS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(HOST_LMS)}"
        raise ValueError(f"model={name} is unknown; {hint} (or pass lm_path for a local directory)")
    return HOST_LMS[name]


def check_checkpoint(name: str, lm_path: str | Path) -> None:
    """Raise ValueError (one line) if the local checkpoint of ``name`` cannot be read or its tensors do not fit.

    Reads the files' headers alone, so that a launch can ask before any pack; `load_host_lm` asks again.
    """
    weights.check_directory(name, weights.directory_of(name, lm_path))


def check_layer(name: str, layer: int, n_layers: int | None = None) -> int:
    """``layer`` itself if it is a block of ``name``; raises ValueError otherwise."""
    n_layers = HOST_LMS[name].n_layers if n_layers is None else n_layers
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer={layer} is out of range for {name} (0..{n_layers - 1})")
    return layer


def lm_flops_per_token(
    name: str, up_to_layer: int | None = None, *, context: int = 256, lm_path: str | Path | None = None
) -> float:
    """Forward FLOPs per token through block ``up_to_layer``, or through the whole LM with its head (None).

    Two per multiply-add; attention at the causal average of context/2 keys: 2·2·d·context/2 per block.
    """
    spec = host_lm_spec(name, lm_path)
    blocks = spec.n_layers if up_to_layer is None else check_layer(name, up_to_layer, spec.n_layers) + 1
    trunk = blocks * (2.0 * spec.block_matmul_parameters + 2.0 * spec.d_model * context)
    return trunk + (2.0 * spec.d_model * spec.d_vocab if up_to_layer is None else 0.0)
