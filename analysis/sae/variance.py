"""What owns the variance of a layer: the tokens and directions that hold SST = Σ‖a − ā‖², and R² without them.

Shape suffixes: B sequences of a batch, S evaluated sequences, T tokens of a sequence, N = S·T, D activation width,
K kept tokens, M removed tokens.

A few tokens, the first of each sequence among them, carry activations tens of times longer than the others in many
language models ("attention sinks", Xiao et al. 2023, arXiv:2309.17453; "massive activations", Sun et al. 2024,
arXiv:2402.17762). They hold nearly all of Σ‖a − ā‖², so R² and the participation ratio then measure these tokens.

**Sinks** here: the first token of each sequence, and each token whose norm exceeds SINK_NORM = 3 times the median norm
of the layer, though of the later tokens no more than SINK_SHARE = 2% of all tokens, the longest. (In SmolLM2-135M's
layers 11 to 27 any multiple from 2 to 8 marks the same tokens.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from analysis.sae.columns import (
    CONTROLS,
    DIRECTIONS,
    SEQUENCE_SUMS,
    SETS,
    SINK_NORM,
    SINK_SHARE,
    TOP_SHARE,
)
from analysis.sae.geometry import CovarianceSums, participation_ratio_of, rounding_floor


def huge_tokens(norm_ST: torch.Tensor) -> torch.Tensor:
    """bool [S, T]: the tokens whose norm makes them sinks (see the module's head), first tokens among them."""
    norm_ST = norm_ST.cpu()
    huge_ST = norm_ST > SINK_NORM * float(np.median(norm_ST.numpy()))
    later_ST = torch.where(huge_ST, norm_ST, 0.0)
    later_ST[:, 0] = 0.0
    order_N = torch.argsort(later_ST.flatten(), descending=True, stable=True)
    rank_ST = order_N.argsort().reshape(norm_ST.shape)
    within_ST = rank_ST < math.ceil(SINK_SHARE * norm_ST.numel())
    within_ST[:, 0] = True
    return huge_ST & within_ST


class VarianceSums:
    """Streaming sums of one layer over whole sequences, float64: its covariance, and the tokens that stand out.

    Kept of the activations: the first four tokens of each sequence and, of all but the first, the `SINK_SHARE` of the
    tokens that are longest, so that everything in `summary` is exact after one pass. One norm per token is kept, too.

    Args:
        n_tokens: N, how many tokens will be streamed in all; `summary` raises ValueError when others came.
    """

    def __init__(self, n_tokens: int) -> None:
        self.covariance = CovarianceSums()
        self.n_tokens = n_tokens
        self._room = math.ceil(SINK_SHARE * n_tokens)
        self._norms: list[torch.Tensor] = []
        self._first: list[torch.Tensor] = []
        self._long_KD = torch.empty(0)
        self._long_K = torch.empty(0)  # their norms, falling
        self._place_K = torch.empty(0, dtype=torch.int64)  # and places in the stream
        self._near: list[torch.Tensor] = []  # tokens 2 to 4 of each sequence

    def update(self, a_BTD: torch.Tensor) -> None:
        """Add whole sequences of the same length."""
        a_BTD = a_BTD.detach()
        before = self.covariance.n_tokens
        self.covariance.update(a_BTD)
        norm_BT = a_BTD.to(torch.float64).norm(dim=-1)
        self._norms.append(norm_BT)
        self._first.append(a_BTD[:, 0])
        self._near.append(a_BTD[:, 1:4].flatten(0, 1))
        place_BT = torch.arange(before, before + norm_BT.numel(), device=a_BTD.device).reshape(norm_BT.shape)
        rest_KD, rest_K = a_BTD[:, 1:].flatten(0, 1), norm_BT[:, 1:].flatten()
        if before:
            rest_KD, rest_K = torch.cat([self._long_KD, rest_KD]), torch.cat([self._long_K, rest_K])
        place_K = torch.cat([self._place_K.to(a_BTD.device), place_BT[:, 1:].flatten()])
        order = torch.argsort(rest_K, descending=True, stable=True)[: self._room]
        self._long_KD, self._long_K, self._place_K = rest_KD[order], rest_K[order], place_K[order]

    @property
    def norm_ST(self) -> torch.Tensor:
        """‖a‖ of each token, float64 [S, T]."""
        return torch.cat(self._norms)

    def summary(self) -> dict[str, float]:
        """`CovarianceSums.summary` and LAYER_COLUMNS.

        pr_no_sinks: participation ratio of the tokens that are no sinks, around their own mean; NaN where they do not
            vary.
        sst_share_first, _first4, _top1pct, _sinks: share of Σ‖a − ā‖² in the first token of each sequence, its first
            four, the TOP_SHARE = 1% of all tokens that are longest, and the sinks; sink_share: the sinks' share of
            the tokens.
        sst_share_eigM: share of the M largest eigenvalues of the covariance.
        r2_constant: R² of a code that gives the sinks exactly and one constant, their mean, for all other tokens.
        sst_token, energy_token: Σ‖a − ā‖² and Σ‖a‖² a token.
        """
        if self.covariance.n_tokens != self.n_tokens:
            raise ValueError(f"{self.covariance.n_tokens} tokens came of n_tokens={self.n_tokens}; announce them all")
        mean_D, covariance_DD = self.covariance.mean_D, self.covariance.covariance_DD()
        eigenvalues_D = self.covariance.eigenvalues_D()
        sst = float(covariance_DD.trace()) * self.n_tokens
        first_SD, near_KD, long_KD = (
            x.to(torch.float64) - mean_D for x in (torch.cat(self._first), torch.cat(self._near), self._long_KD)
        )
        first_S, long_K = first_SD.square().sum(dim=1), long_KD.square().sum(dim=1)
        norm_ST = self.norm_ST
        huge_K = huge_tokens(norm_ST).flatten().to(self._place_K.device)[self._place_K]
        sinks_MD = torch.cat([first_SD, long_KD[huge_K]])
        kept = self.n_tokens - len(sinks_MD)
        rest_DD = self._without(sinks_MD, covariance_DD)
        longest = torch.argsort(torch.cat([norm_ST[:, 0], self._long_K]), descending=True, stable=True)
        top = longest[: math.ceil(TOP_SHARE * self.n_tokens)]
        largest = eigenvalues_D.flip(0).cumsum(0) / eigenvalues_D.sum()
        floor = rounding_floor(eigenvalues_D, self.n_tokens)
        return {
            **self.covariance.summary(eigenvalues_D),
            "pr_no_sinks": _ratio_or_nan(torch.linalg.eigvalsh(rest_DD), floor),
            "sst_share_first": float(first_S.sum()) / sst,
            "sst_share_first4": float(first_S.sum() + near_KD.square().sum()) / sst,
            "sst_share_top1pct": float(torch.cat([first_S, long_K])[top].sum()) / sst,
            **{f"sst_share_eig{m}": float(largest[min(m, len(largest)) - 1]) for m in DIRECTIONS},
            "sink_share": len(sinks_MD) / self.n_tokens,
            "sst_share_sinks": float(sinks_MD.square().sum()) / sst,
            "r2_constant": 1.0 - max(0.0, float(rest_DD.trace())) * kept / sst,
            "sst_token": sst / self.n_tokens,
            "energy_token": sst / self.n_tokens + float(mean_D.square().sum()),
        }

    def _without(self, removed_MD: torch.Tensor, covariance_DD: torch.Tensor) -> torch.Tensor:
        """Covariance of all tokens but some, around their own mean; `removed_MD` are those, less the mean of all."""
        kept = self.n_tokens - len(removed_MD)
        if kept < 1:
            return torch.zeros_like(covariance_DD)
        shift_D = -removed_MD.sum(dim=0) / kept
        outer_DD = covariance_DD * self.n_tokens - removed_MD.T @ removed_MD
        return outer_DD / kept - torch.outer(shift_D, shift_D)


def _ratio_or_nan(eigenvalues_D: torch.Tensor, floor: float) -> float:
    return participation_ratio_of(eigenvalues_D, floor) if float(eigenvalues_D[-1]) > floor else float("nan")


@dataclass(frozen=True)
class Controls:
    """What every SAE of a layer is judged by in addition to the plain R², made once per layer of evaluated activations.

    keep_PST, sst_PS: for each of SETS the tokens that it leaves in, as 0 or 1 in float64, and their Σ‖a − ā‖² in each
    sequence, ā the mean of all tokens that are left in. eigenvalues_D, vectors_DD: of the covariance of all evaluated
    tokens, ascending; n_tokens: how many.
    """

    keep_PST: torch.Tensor
    sst_PS: torch.Tensor
    eigenvalues_D: torch.Tensor
    vectors_DD: torch.Tensor
    n_tokens: int

    @classmethod
    def of(
        cls, a_STD: torch.Tensor, norm_ST: torch.Tensor, covariance: CovarianceSums, evaluated_ST: torch.Tensor
    ) -> Controls:
        """From a layer's activations, their norms, and the covariance of those that are evaluated (bool [S, T])."""
        position_T = torch.arange(a_STD.shape[1], device=a_STD.device)
        huge_ST = huge_tokens(norm_ST).to(a_STD.device)
        left_in = (position_T >= 1, position_T >= 4, ~huge_ST, (position_T >= 1) & ~huge_ST)
        keep_PST = torch.stack([evaluated_ST & x for x in left_in]).to(torch.float64)
        mean_D = covariance.mean_D
        sums, squares = [], []
        for a_TD, keep_PT in zip(a_STD, keep_PST.unbind(1), strict=True):
            centred_TD = a_TD.to(torch.float64) - mean_D
            sums.append(keep_PT @ centred_TD)
            squares.append(keep_PT @ centred_TD.square().sum(dim=1))
        sum_PSD, n_PS = torch.stack(sums, dim=1), keep_PST.sum(dim=2)
        own_P1D = (sum_PSD.sum(dim=1) / n_PS.sum(dim=1, keepdim=True))[:, None]  # their mean less the mean of all
        sst_PS = torch.stack(squares, dim=1) - 2 * (sum_PSD * own_P1D).sum(dim=2) + n_PS * own_P1D.square().sum(dim=2)
        eigenvalues_D, vectors_DD = torch.linalg.eigh(covariance.covariance_DD())
        return cls(keep_PST, sst_PS, eigenvalues_D.clamp(min=0.0), vectors_DD, covariance.n_tokens)


class ControlledErrors:
    """CONTROLS of one SAE from a stream of reconstructions, float64; one object a cell."""

    def __init__(self, controls: Controls) -> None:
        self.controls = controls
        self._sse_PS = torch.zeros_like(controls.sst_PS)
        self._error_D = torch.zeros_like(controls.eigenvalues_D)  # Σ (vᵀδ)² for each eigenvector v

    def update(self, a_BTD: torch.Tensor, a_hat_BTD: torch.Tensor, rows: slice) -> None:
        """Add the sequences `rows`; a token that is not evaluated must be reconstructed exactly."""
        delta_BTD = a_hat_BTD.to(torch.float64) - a_BTD.to(torch.float64)
        self._sse_PS[:, rows] += (self.controls.keep_PST[:, rows] * delta_BTD.square().sum(dim=-1)).sum(dim=2)
        self._error_D += (delta_BTD.flatten(0, 1) @ self.controls.vectors_DD).square().sum(dim=0)

    def by_sequence(self) -> dict[str, list[float]]:
        """SEQUENCE_SUMS: the two sums that give r2_no_sinks, one entry per sequence."""
        sums = (self._sse_PS[SETS.index("no_sinks")], self.controls.sst_PS[SETS.index("no_sinks")])
        return {name: x.tolist() for name, x in zip(SEQUENCE_SUMS, sums, strict=True)}

    def metrics(self) -> dict[str, float]:
        """R² = 1 − SSE / SST by another choice of tokens or coordinates; NaN where nothing varies there.

        r2_no_first, _no_first4: without the first token, or the first four, of each sequence. r2_no_huge: without the
            tokens beyond SINK_NORM times the median norm. r2_no_sinks: without sinks (the first token and these). ā is
            the mean of the tokens left in.
        r2_deflatedM: in the coordinates that are left when the M leading eigenvectors of the covariance are taken out.
        r2_whitened: 1 − tr(Σ⁺E) / rank Σ, E the mean of δδᵀ and Σ the covariance: every direction counts equally.
        """
        of = self.controls
        floor = rounding_floor(of.eigenvalues_D, of.n_tokens)
        result = {
            f"r2_{name}": _r2(float(sse_S.sum()), float(sst_S.sum()), floor * of.n_tokens)
            for name, sse_S, sst_S in zip(SETS, self._sse_PS, of.sst_PS, strict=True)
        }
        for m in DIRECTIONS:
            sse, sst = (float(x[: max(0, len(x) - m)].sum()) for x in (self._error_D, of.eigenvalues_D * of.n_tokens))
            result[f"r2_deflated{m}"] = _r2(sse, sst, floor * of.n_tokens)
        varies_D = of.eigenvalues_D > floor
        ratio_D = self._error_D[varies_D] / (of.eigenvalues_D[varies_D] * of.n_tokens)
        result["r2_whitened"] = 1.0 - float(ratio_D.mean())  # NaN where nothing varies
        return {name: result[name] for name in CONTROLS}


def _r2(sse: float, sst: float, floor: float) -> float:
    return 1.0 - sse / sst if sst > floor else float("nan")
