"""How far a patch moves the attention of the later layers, as transport plans.

Row i of softmax attention is the one plan that minimises ⟨C_i, P_i⟩ − ε H(P_i) over the simplex, with C = −QKᵀ and
1/ε the scale of the scores (Litman 2025, arXiv:2508.08369). Of the unpatched plan P and the patched one P̂ two numbers
are kept per layer, means over heads and over rows with more than one admissible key, in units of ε:

    divergence      KL(P̂_i ‖ P_i), which is the excess of the free energy: F_C(P̂) − F_C(P) = ε KL(P̂ ‖ P) exactly
    transport cost  ⟨C, P̂ − P⟩ / ε

Queries and keys are seen where transformers hands them to its attention function; the plans of one sequence of one
layer exist at a time.

Shape suffixes: B sequences, T queries and keys, H heads, E head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_MASKED = -1e30  # finite, so that masked entries of two plans cancel instead of giving NaN


class NoPlans(Exception):
    """A model whose attention has no plans to compare; the text says why."""


@dataclass(frozen=True)
class Scores:
    """What one layer's attention function was given: query_BHTE, key_BKTE (K key heads), mask or None, scale, cap."""

    query_BHTE: Tensor
    key_BKTE: Tensor
    mask: Tensor | None
    scale: float
    cap: float

    def of(self, sequence: int) -> tuple[Tensor, Tensor]:
        """(scaled scores [H, T, T], masked where a key is not admissible; admissible bool [1 or H, T, T])."""
        query_HTE, key_KTE = (x[sequence].detach() for x in (self.query_BHTE, self.key_BKTE))
        dtype = torch.promote_types(query_HTE.dtype, torch.float32)
        key_HTE = key_KTE.to(dtype).repeat_interleave(len(query_HTE) // len(key_KTE), dim=0)
        bias, admissible = self._bias(sequence, query_HTE.shape[1], key_HTE.shape[1], dtype)
        if not self.cap:
            bias = bias.expand(len(query_HTE), -1, -1)
            return torch.baddbmm(bias, query_HTE.to(dtype), key_HTE.mT, alpha=self.scale), admissible
        scores_HTT = (query_HTE.to(dtype) @ key_HTE.mT).mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return scores_HTT.add_(bias), admissible

    def _bias(self, sequence: int, queries: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(what is added to the scores: _MASKED where not admissible; admissible), [1 or H, T, T] each."""
        device = self.query_BHTE.device
        if self.mask is None:
            admissible = torch.ones(1, queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
            return torch.zeros(admissible.shape, dtype=dtype, device=device).masked_fill_(
                ~admissible, _MASKED
            ), admissible
        mask = self.mask[min(sequence, len(self.mask) - 1)][..., :keys]
        if mask.dtype == torch.bool:
            return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, _MASKED), mask
        admissible = mask > torch.finfo(mask.dtype).min / 2
        return mask.to(dtype).masked_fill(~admissible, _MASKED), admissible


def compared(before: Scores, after: Scores) -> tuple[Tensor, Tensor]:
    """(divergence, change of transport cost) of each sequence, [B] each, in units of ε.

    KL(P̂ ‖ P) = Σ P̂ (ŝ − s) − (log Ẑ − log Z), s the scores and log Z = max s − log max P: softmax alone is cheap.
    """
    found = []
    for sequence in range(len(after.query_BHTE)):
        (s, admissible), (s_hat, _) = before.of(sequence), after.of(sequence)
        p, p_hat = s.softmax(-1), s_hat.softmax(-1)
        log_z_HT, log_z_hat_HT = (x.amax(-1) - y.amax(-1).log() for x, y in ((s, p), (s_hat, p_hat)))
        cost_HT = -torch.linalg.vecdot(p.neg_().add_(p_hat), s)
        divergence_HT = torch.linalg.vecdot(p_hat, s_hat.sub_(s)) - (log_z_hat_HT - log_z_HT)
        several = (admissible.sum(-1) > 1).expand_as(divergence_HT)
        n = several.sum().clamp(min=1)
        found.append(torch.stack([(x * several).sum() / n for x in (divergence_HT, cost_HT)]))
    divergence_B, cost_B = torch.stack(found).double().unbind(1)
    return divergence_B, cost_B


class AttentionPlans:
    """The later layers' scores of one unpatched pass, and the distance of patched passes from them."""

    def __init__(
        self, implementation: str, comparing: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        """``implementation``: the model's `config._attn_implementation`. ``comparing`` surrounds each comparison of
        plans (to time it)."""
        self._implementation = implementation
        self._comparing = comparing
        self._before: dict[int, Scores] = {}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The pass inside is the unpatched one; it may be a forward-mode pass."""
        self._before = {}
        with _watching(self._implementation, self._before.__setitem__):
            yield

    @contextmanager
    def distances(self) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        """{layer: `compared`} of the patched pass inside, filled as it runs.

        Raises NoPlans when the pass goes through no attention function that the reference went through.
        """
        found: dict[int, tuple[Tensor, Tensor]] = {}

        def compare(layer: int, scores: Scores) -> None:
            if layer in self._before:
                with self._comparing():
                    found[layer] = compared(self._before[layer], scores)

        with _watching(self._implementation, compare):
            yield found
        if not found:
            raise NoPlans("no later layer has softmax attention that transformers' attention interface runs")


@contextmanager
def _watching(implementation: str, visit: Callable[[int, Scores], None]) -> Iterator[None]:
    """Show every call of the attention function to `visit`; what it computes stays the same."""
    table = ALL_ATTENTION_FUNCTIONS
    before = table.get(implementation)

    def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        own = before or sys.modules[type(module).__module__].eager_attention_forward
        visit(int(module.layer_idx), _scores(module, _primal(query), _primal(key), mask, options))
        return own(module, query, key, value, mask, **options)

    was_local = implementation in table._local_mapping
    table[implementation] = watched
    try:
        yield
    finally:
        if was_local:
            table[implementation] = before
        else:
            del table[implementation]


def _primal(x: Tensor) -> Tensor:
    return forward_ad.unpack_dual(x).primal if forward_ad._current_level >= 0 else x


def _scores(module: Any, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Scores:
    for name in ("s_aux", "position_bias"):
        if options.get(name) is not None:
            raise NoPlans(f"its attention is no softmax over keys alone ({name})")
    scale = options.get("scaling")
    return Scores(
        query,
        key,
        mask,
        float(query.shape[-1] ** -0.5 if scale is None else scale),
        float(options.get("softcap") or 0.0),
    )
