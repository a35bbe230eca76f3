"""The language model under study: activations at a hook, their gradients, and the loss with a patch.

Shape suffixes: B sequences, T tokens, D d_model, V vocabulary. Hooks are TransformerLens names,
``blocks.{L}.hook_resid_post`` (the residual stream after block L), ``hook_resid_pre``, ``hook_mlp_out`` and
``hook_attn_out`` (what MLP and attention add to it). Weights are used unprocessed (no folding of norms, no centring).
The trunk is the Hugging Face model itself, run in part (`models.host.trunk`), which TransformerLens'
TransformerBridge equals bit for bit (a test holds it) and which can start and stop at any block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.host import weights
from models.host.hub import LMUnavailable
from models.host.layout import Layout, find_layout
from models.host.named import UnknownModel
from models.host.next_token_loss import NextTokenLoss, wide
from models.host.predictions import drawn_score
from models.host.specs import HOOKS, HOST_LMS, RESID_POST, RESID_PRE, HostLMSpec
from models.host.trunk import FLAT_WHEN_CONSTANT, SEGMENTED, Hooks, Segments, Trunk
from models.host.weights import Corpus, tokenizer_of

__all__ = [
    "Corpus",
    "HookPlace",
    "HostLM",
    "LMUnavailable",
    "UnknownModel",
    "Unpatched",
    "check_checkpoint",
    "check_hook",
    "check_layer",
    "host_lm_spec",
    "lm_flops_per_token",
    "load_host_lm",
    "tokenizer_of",
]


@dataclass(frozen=True)
class HookPlace:
    """Which activation of a block is under study, and the name of the model's block list where it is not found."""

    hook: str = RESID_POST
    blocks: str = ""

    def __post_init__(self) -> None:
        if self.hook not in HOOKS:
            raise ValueError(f"hook={self.hook} is not known; choose one of {', '.join(HOOKS)}")


@dataclass(frozen=True)
class Unpatched:
    """A forward and backward pass of the unpatched model, shared by every SAE of every hooked layer.

    loss_B: each sequence's mean next-token cross-entropy over its T−1 predictions, nats. activations: {layer: a_BTD}.
    gradients: {layer: ∂L/∂a}, L the sum of these cross-entropies. hidden_BTD: final hidden states (the unembedding's
    input); pull_BTD: ∂L/∂hidden. scores: {layer: ∂/∂a of Σ_t log p_t(y_t)} with each y_t drawn from p_t, where asked
    for: E of their outer product is the Fisher information of the sequence's predictions.
    """

    loss_B: Tensor
    activations: dict[int, Tensor]
    gradients: dict[int, Tensor]
    hidden_BTD: Tensor
    pull_BTD: Tensor
    scores: dict[int, Tensor]


class HostLM:
    """One frozen causal LM, cut at its hooks. Build it with `load_host_lm`; without a ``layout`` the model, in float32,
    is asked for it where its architecture does not settle it.

    Activations, gradients and losses are float32 whatever ``dtype`` the trunk runs in.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        spec: HostLMSpec,
        tokenizer_dir: Path | None,
        place: HookPlace | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.name = name
        self.spec = spec
        self.place = place or HookPlace()
        self.d_model, self.n_layers, self.d_vocab = spec.d_model, spec.n_layers, spec.d_vocab
        self.tokenizer_dir = tokenizer_dir
        self.model = model.eval().requires_grad_(False)
        self._trunk: Trunk
        readout = None
        if _segmented(spec, self.place):
            self._trunk = Segments(model, "final_layer_norm" if spec.architecture == "gpt_neox" else "norm")
        else:
            layout = layout or find_layout(model, spec.n_layers, spec.d_model, self.place.blocks)
            self._trunk, readout = Hooks(model, layout, self.place.hook), layout.readout
            layout.site(layout.block_list(model), 0, self.place.hook)
        self._head = NextTokenLoss(model.get_output_embeddings(), readout)  # type: ignore[operator]

    @property
    def head(self) -> NextTokenLoss:
        """The unembedding and its loss."""
        return self._head

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def hook_name(self, layer: int) -> str:
        """TransformerLens' name of the hook in block ``layer`` (0-based)."""
        return f"blocks.{check_layer(self.name, layer, self.n_layers)}.hook_{self.place.hook}"

    @torch.no_grad()
    def activations(self, tokens_BT: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """The hook's activation in each of ``layers``, {layer: a_BTD}; no block above the deepest one runs."""
        return {layer: wide(a_BTD) for layer, a_BTD in self._trunk.climb(tokens_BT, self._checked(layers))}

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
        found = self.unpatched(tokens_BT, layers, also=also, logits_dtype=logits_dtype)
        return found.loss_B, found.activations, found.gradients

    def unpatched(
        self,
        tokens_BT: Tensor,
        layers: Sequence[int],
        *,
        also: Sequence[int] = (),
        logits_dtype: torch.dtype = torch.float32,
        draws: torch.Generator | None = None,
    ) -> Unpatched:
        """`loss_and_gradients` with what else the same pass gives; ``draws`` asks for the scores of drawn labels, which
        take one more backward pass."""
        wanted = self._checked(layers)
        stops = self._checked([*layers, *also])
        seen, hidden_BTD = self._trunk.through(tokens_BT, stops, wanted[0])
        leaves = [seen[layer] for layer in wanted]
        with torch.enable_grad():
            sum_B = self._head(hidden_BTD, tokens_BT, logits_dtype=logits_dtype)
            *gradients, pull_BTD = torch.autograd.grad(
                sum_B.sum(), [*leaves, hidden_BTD], retain_graph=draws is not None
            )
        scores: Sequence[Tensor] = ()
        if draws is not None:
            up_BTD = drawn_score(self._head, hidden_BTD.detach(), pull_BTD, tokens_BT, draws, logits_dtype)
            scores = torch.autograd.grad(hidden_BTD, leaves, up_BTD)
        return Unpatched(
            sum_B.detach() / (tokens_BT.shape[1] - 1),
            {layer: wide(a.detach()) for layer, a in seen.items()},
            {layer: wide(g) for layer, g in zip(wanted, gradients, strict=True)},
            wide(hidden_BTD.detach()),
            wide(pull_BTD),
            {layer: wide(s) for layer, s in zip(wanted, scores, strict=False)},
        )

    @torch.no_grad()
    def patched_loss(
        self, a_BTD: Tensor, layer: int, tokens_BT: Tensor, *, logits_dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The mean losses [B] with the hook's activation in block ``layer`` replaced by ``a_BTD``.

        Only later blocks run (at the hooks inside a block all of them do). B is free: stack several cells'
        reconstructions (and repeat the tokens) to run them in one pass. `zero_loss` has the loss of zeros for less.
        """
        hidden_BTD = self.tail(layer, tokens_BT)(a_BTD.to(self.dtype))
        return self.mean_loss(hidden_BTD, tokens_BT, logits_dtype=logits_dtype)

    def tail(self, layer: int, tokens_BT: Tensor) -> Callable[[Tensor], Tensor]:
        """Final hidden states [B, T, D] (the unembedding's input) as a function of the hook's activation a_BTD.

        Differentiable in reverse and forward mode (the latter under `SDPBackend.MATH`).
        """
        return self._trunk.tail(check_layer(self.name, layer, self.n_layers), tokens_BT)

    @torch.no_grad()
    def zero_loss(self, layer: int, tokens_BT: Tensor) -> Tensor:
        """`patched_loss` of zeros, [B].

        Where a residual stream of zeros stays the same at all positions (`FLAT_WHEN_CONSTANT`), one is computed;
        elsewhere the pass is a real one.
        """
        check_layer(self.name, layer, self.n_layers)
        if self.spec.architecture not in FLAT_WHEN_CONSTANT or self.place.hook not in (RESID_POST, RESID_PRE):
            zeros_BTD = torch.zeros(*tokens_BT.shape, self.d_model, device=self.device)
            return self.patched_loss(zeros_BTD, layer, tokens_BT)
        zero_11D = torch.zeros(1, 1, self.d_model, device=self.device, dtype=self.dtype)
        hidden_11D = self.tail(layer, tokens_BT[:1, :1])(zero_11D)
        return self._head.of_constant(hidden_11D[0, 0], tokens_BT) / (tokens_BT.shape[1] - 1)

    def mean_loss(self, hidden_BTD: Tensor, tokens_BT: Tensor, *, logits_dtype: torch.dtype = torch.float32) -> Tensor:
        """Each sequence's mean next-token cross-entropy [B] from final hidden states."""
        return self._head(hidden_BTD, tokens_BT, logits_dtype=logits_dtype) / (tokens_BT.shape[1] - 1)

    def _checked(self, layers: Sequence[int]) -> list[int]:
        if not layers:
            raise ValueError("layers=[] asks for no activation; name at least one layer")
        return sorted({check_layer(self.name, layer, self.n_layers) for layer in layers})


def load_host_lm(
    name: str,
    *,
    lm_path: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_dir: str | Path | None = None,
    corpus: Corpus | None = None,
    revision: str | None = None,
    place: HookPlace | None = None,
) -> HostLM:
    """The LM called ``name``, frozen, in evaluation mode: a key of `models.host.specs.HOST_LMS`, a local directory in
    Hugging Face format, a ``.gguf`` file, or ``OWNER/NAME`` on the hub.

    ``lm_path`` reads a directory in Hugging Face format instead: the directory itself, or its sub-directory
    called ``name``; a ``name`` outside the table is then free. Its sizes must be those of ``name``. For a model that
    benchmarks/fetch_models.py fetches it is the folder of weights.
    ``cache_dir`` (default $PLUMBLINE_CACHE, else ~/.cache/plumbline) keeps dequantised and stand-in weights.
    ``corpus`` is needed by the stand-ins alone, which are pretrained on it when not cached.
    ``revision`` is the commit (or branch) of a model on the hub, ``main`` when not given. ``place`` is the hook.

    Raises ValueError for an unknown name, sizes that disagree, files that cannot be read or tensors that are missing,
    left over or of another shape; LMUnavailable without network.
    """
    directory, spec = weights.locate(name, lm_path=lm_path, cache_dir=cache_dir, corpus=corpus, revision=revision)
    model = weights.read(name, directory, spec, revision)
    tokenizer = Path(directory) if (Path(directory) / "tokenizer.json").exists() else None
    place = place or HookPlace()
    layout = None  # is found in float32, before numbers are rounded
    if not _segmented(spec, place):
        layout = find_layout(model.eval(), spec.n_layers, spec.d_model, place.blocks)
    return HostLM(name, model.to(device=device, dtype=dtype), spec, tokenizer, place, layout)


def _segmented(spec: HostLMSpec, place: HookPlace) -> bool:
    return spec.architecture in SEGMENTED and place == HookPlace()


def host_lm_spec(name: str, lm_path: str | Path | None = None, revision: str | None = None) -> HostLMSpec:
    """Sizes and depths of ``name`` without loading weights, from the table or its config.

    Raises ValueError for an unknown name or what is no decoder-only model, LMUnavailable where the hub cannot be asked.
    """
    return weights.spec_of(name, lm_path, revision)


def check_checkpoint(name: str, lm_path: str | Path | None) -> None:
    """Raise ValueError (one line) if the local checkpoint of ``name`` cannot be read or its tensors do not fit.

    Reads the files' headers alone, so that a launch can ask before any pack; `load_host_lm` asks again. A model of the
    hub is not asked for.
    """
    source = weights.source_of(name, lm_path, None, None)
    if isinstance(source, Path):
        weights.check_directory(name, source)


def check_hook(name: str, lm_path: str | Path | None, place: HookPlace) -> None:
    """Raise ValueError (one line) if a model on this machine has no such hook, or its blocks are not found.

    Loads it only where that has to be looked for: the residual stream of an architecture in `FLAT_WHEN_CONSTANT`,
    all of which are tested, is known to be there.
    """
    spec = weights.spec_of(name, lm_path)
    if not place.blocks and place.hook in (RESID_POST, RESID_PRE) and spec.architecture in FLAT_WHEN_CONSTANT:
        return
    load_host_lm(name, lm_path=lm_path, place=place)


def check_layer(name: str, layer: int, n_layers: int | None = None) -> int:
    """``layer`` itself if it is a block of ``name``; raises ValueError otherwise."""
    n_layers = HOST_LMS[name].n_layers if n_layers is None else n_layers
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer={layer} is out of range for {name} (0..{n_layers - 1})")
    return layer


def lm_flops_per_token(
    name: str,
    up_to_layer: int | None = None,
    *,
    context: int = 256,
    lm_path: str | Path | None = None,
) -> float:
    """`HostLMSpec.flops_per_token` of a model by name; raises ValueError for a block that it lacks."""
    spec = host_lm_spec(name, lm_path)
    if up_to_layer is not None:
        check_layer(name, up_to_layer, spec.n_layers)
    return spec.flops_per_token(up_to_layer, context)
