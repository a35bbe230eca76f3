"""How well a reconstruction â of an activation a does, in norms and in the language model's own loss.

Shape suffixes: T tokens, B sequences in a batch, D activation width, S evaluated sequences.

Every ratio is a ratio of sums over all evaluated tokens, unless its name says "legacy". Sums run in
float64 whatever the input's type, because a residual stream's mean can exceed its spread by orders of
magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from analysis.sae.columns import LOSSES, SEQUENCE_COLUMNS, TOKEN_SUMS

Array = torch.Tensor | npt.NDArray[np.floating]
Losses = torch.Tensor | npt.NDArray[np.floating] | Sequence[float] | float

RELATIVE_ERROR_EPS = 1e-10  # the study's guard in ‖a − â‖ / (‖a‖ + eps)


def _double(x: Array | Losses) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x.detach().to(torch.float64)
    return torch.from_numpy(np.array(x, dtype=np.float64))


def _pair(a_TD: Array, a_hat_TD: Array) -> tuple[torch.Tensor, torch.Tensor]:
    a, a_hat = _double(a_TD), _double(a_hat_TD)
    if a.shape != a_hat.shape or a.ndim < 2 or a.numel() == 0:
        raise ValueError(
            f"a has shape {tuple(a.shape)} and a_hat {tuple(a_hat.shape)}; both must be the same non-empty "
            "(tokens, d_model); reshape or drop the extra tokens"
        )
    a, a_hat = a.reshape(-1, a.shape[-1]), a_hat.reshape(-1, a.shape[-1]).to(a.device)
    for name, x in (("a", a), ("a_hat", a_hat)):
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise ValueError(f"{name} holds {bad} non-finite values; drop those tokens or repair their source")
    return a, a_hat


def _variation(total: float, what: str) -> float:
    if not total > 0:
        raise ValueError(f"{what} is {total:g}; R² needs activations that vary; evaluate more than one distinct token")
    return total


def r2(a_TD: Array, a_hat_TD: Array) -> float:
    """R² = 1 − Σ‖a − â‖² / Σ‖a − ā‖², ā the per-dimension mean over the given tokens.

    Both sums run over tokens and dimensions. â = ā gives 0 at any scale and offset, â = a gives 1.
    Raises ValueError on shapes that differ, non-finite values, or activations that do not vary.
    """
    a, a_hat = _pair(a_TD, a_hat_TD)
    sst = float((a - a.mean(dim=0)).square().sum())
    return 1.0 - float((a - a_hat).square().sum()) / _variation(sst, "Σ‖a − ā‖²")


def r2_legacy(a_TD: Array, a_hat_TD: Array) -> float:
    """The mean over tokens of 1 − ‖a_t − â_t‖² / ‖a_t − ā‖² (SAELens' `explained_variance_legacy`).

    A mean of ratios, so tokens close to the mean weigh most; ā is the mean over all given tokens, which
    makes the value independent of batching (SAELens takes each batch's own mean).
    """
    a, a_hat = _pair(a_TD, a_hat_TD)
    sst_T = (a - a.mean(dim=0)).square().sum(dim=1)
    _variation(float(sst_T.min()), "the smallest ‖a_t − ā‖²")
    return 1.0 - float(((a - a_hat).square().sum(dim=1) / sst_T).mean())


def r2_energy(a_TD: Array, a_hat_TD: Array) -> float:
    """1 − E‖a − â‖² / (E‖a‖² − ‖E a‖²) (SAELens' `explained_variance`).

    Equal to `r2` in exact arithmetic. The denominator subtracts two large numbers, so the gap between
    the two values shows the cancellation: about 2⁻⁵² E‖a‖² / Var(a).
    """
    a, a_hat = _pair(a_TD, a_hat_TD)
    energy = float(a.square().sum(dim=1).mean() - a.mean(dim=0).square().sum())
    return 1.0 - float((a - a_hat).square().sum(dim=1).mean()) / _variation(energy, "E‖a‖² − ‖E a‖²")


def cosine(a_TD: Array, a_hat_TD: Array) -> float:
    """Mean over tokens of cos(a_t, â_t); a zero vector counts as cosine 0."""
    a, a_hat = _pair(a_TD, a_hat_TD)
    return float(_token_cosine(a, a_hat).mean())


def relative_error(a_TD: Array, a_hat_TD: Array) -> float:
    """Mean over tokens of ‖a_t − â_t‖ / (‖a_t‖ + 1e-10)."""
    a, a_hat = _pair(a_TD, a_hat_TD)
    return float(((a - a_hat).norm(dim=1) / (a.norm(dim=1) + RELATIVE_ERROR_EPS)).mean())


def mse(a_TD: Array, a_hat_TD: Array) -> float:
    """E[‖a − â‖² / d_model]."""
    a, a_hat = _pair(a_TD, a_hat_TD)
    return float((a - a_hat).square().mean())


def nmse(a_TD: Array, a_hat_TD: Array) -> float:
    """Σ‖a − â‖² / Σ‖a‖². Around the origin, not the mean, so it is not 1 − R²."""
    a, a_hat = _pair(a_TD, a_hat_TD)
    return float((a - a_hat).square().sum()) / _variation(float(a.square().sum()), "Σ‖a‖²")


def _token_cosine(a: torch.Tensor, a_hat: torch.Tensor) -> torch.Tensor:
    norms = a.norm(dim=-1) * a_hat.norm(dim=-1)
    return (a * a_hat).sum(dim=-1) / norms.clamp(min=torch.finfo(torch.float64).tiny)


def _mean_loss(name: str, loss: Losses) -> float:
    value = float(_double(loss).mean())
    if not np.isfinite(value):
        raise ValueError(f"{name} averages to {value}; losses must be finite nats a token")
    return value


def ce_rec(loss_orig: Losses, loss_recon: Losses) -> float:
    """CE_rec = 2 − L_recon / L_orig: 1 when the patched loss is unchanged, 0 when it doubled.

    Next-token cross-entropies in nats per token; arrays (one entry per sequence of equal length) are averaged
    first, so the value is a ratio of sums. Not normalised by an ablation: that is `ce_loss_score`.
    """
    original = _mean_loss("loss_orig", loss_orig)
    if original <= 0:
        raise ValueError(f"loss_orig={original:g} must be > 0 nats a token for the ratio L_recon / L_orig")
    return 2.0 - _mean_loss("loss_recon", loss_recon) / original


def ce_loss_score(loss_orig: Losses, loss_recon: Losses, loss_zero: Losses) -> float:
    """(L_zero − L_recon) / (L_zero − L_orig), L_zero with the activation replaced by zeros.

    The share of the zero-ablation damage that the reconstruction undoes (SAELens' `ce_loss_score`).
    """
    original, zero = _mean_loss("loss_orig", loss_orig), _mean_loss("loss_zero", loss_zero)
    if zero == original:
        raise ValueError(
            f"loss_zero equals loss_orig ({zero:g}); ablating this hook changes nothing, so the score is "
            "undefined; report ce_rec instead"
        )
    return (zero - _mean_loss("loss_recon", loss_recon)) / (zero - original)


class SequenceSums:
    """Sums per evaluated sequence from a stream of batches; one object a cell (one SAE).

    `mean_D` is ā, the per-dimension mean over exactly the tokens that will be streamed; one earlier pass
    gives it (`geometry.CovarianceSums.mean_D`) and every cell of a layer shares it. It enters `sst` and
    the legacy ratios; `table` and `metrics` compare it with the mean of what was streamed and raise
    when it was another set's. A sequence may arrive in pieces and in any order. Sums stay on the
    activations' device until `table` is called.
    """

    def __init__(self, mean_D: Array) -> None:
        self.mean_D = _double(mean_D)
        if self.mean_D.ndim != 1:
            raise ValueError(f"mean_D has shape {tuple(self.mean_D.shape)}; give one mean per dimension (d_model,)")
        self._sequence_ids: list[torch.Tensor] = []
        self._n_tokens: list[int] = []
        self._sums: list[torch.Tensor] = []
        self._sum_D = torch.zeros_like(self.mean_D)
        self._losses: dict[int, tuple[float, ...]] = {}
        self._table: pd.DataFrame | None = None

    def update(
        self,
        a_BTD: torch.Tensor,
        a_hat_BTD: torch.Tensor,
        sequence_B: torch.Tensor | Sequence[int],
        g_BTD: torch.Tensor | None = None,
        evaluated_BT: torch.Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            a_BTD: activations at the hook.
            a_hat_BTD: their reconstructions.
            sequence_B: the id of each row's sequence.
            g_BTD: ∂L/∂a at the hook from the unpatched pass, or None when not measured (SWD is then NaN).
                Take L as the sum over tokens of nats, so that g does not depend on the batch size.
            evaluated_BT: bool, the tokens that count (in every sum and in n_tokens); None: all.
        """
        ids = torch.as_tensor(sequence_B, dtype=torch.int64)
        self._table = None
        d = self.mean_D.numel()
        if a_BTD.ndim != 3 or a_BTD.shape[-1] != d or a_hat_BTD.shape != a_BTD.shape or len(ids) != len(a_BTD):
            raise ValueError(
                f"a {tuple(a_BTD.shape)}, a_hat {tuple(a_hat_BTD.shape)} and {len(ids)} sequence ids do not match "
                f"(B, T, {d}) and B"
            )
        if g_BTD is not None and g_BTD.shape != a_BTD.shape:
            raise ValueError(f"g has shape {tuple(g_BTD.shape)}; it must equal a's {tuple(a_BTD.shape)}")
        self.mean_D, self._sum_D = self.mean_D.to(a_BTD.device), self._sum_D.to(a_BTD.device)
        # on a CPU one sequence at a time keeps the float64 temporaries in cache
        size = 1 if a_BTD.device.type == "cpu" else len(ids)
        gradients = [None] * len(ids) if g_BTD is None else g_BTD.split(size)
        counted = [None] * len(ids) if evaluated_BT is None else evaluated_BT.split(size)
        for a, a_hat, g, counts in zip(a_BTD.split(size), a_hat_BTD.split(size), gradients, counted, strict=False):
            self._add(_double(a), _double(a_hat), None if g is None else _double(g), counts)
        self._sequence_ids.append(ids.cpu())
        whole = [a_BTD.shape[1]] * len(ids)
        self._n_tokens += whole if evaluated_BT is None else evaluated_BT.sum(dim=1).tolist()

    def _add(self, a: torch.Tensor, a_hat: torch.Tensor, g: torch.Tensor | None, counts: torch.Tensor | None) -> None:
        delta = a_hat - a
        sse_BT = delta.square().sum(dim=-1)
        norm_BT = a.norm(dim=-1)
        centred = a - self.mean_D
        sst_BT = centred.square().sum(dim=-1)
        effect_BT = torch.full_like(sse_BT, float("nan")) if g is None else (g * delta).sum(dim=-1)
        per_token = (
            sse_BT,
            sst_BT,
            norm_BT.square(),
            _token_cosine(a, a_hat),
            sse_BT.sqrt() / (norm_BT + RELATIVE_ERROR_EPS),
            effect_BT.square(),
            effect_BT.abs(),
            1.0 - sse_BT / sst_BT,
        )
        if counts is not None:
            centred = torch.where(counts[..., None], centred, 0.0)
        counted = per_token if counts is None else [torch.where(counts, x, 0.0) for x in per_token]
        self._sums.append(torch.stack([x.sum(dim=1) for x in counted], dim=1))
        self._sum_D += centred.sum(dim=(0, 1))

    def add_losses(
        self, sequence_B: torch.Tensor | Sequence[int], loss_orig_B: Losses, loss_recon_B: Losses, loss_zero_B: Losses
    ) -> None:
        """Set the mean next-token cross-entropy (nats per token) of each sequence, one entry per sequence."""
        ids = torch.as_tensor(sequence_B, dtype=torch.int64).tolist()
        columns = [_double(x).reshape(-1).tolist() for x in (loss_orig_B, loss_recon_B, loss_zero_B)]
        if any(len(column) != len(ids) for column in columns):
            raise ValueError(f"{[len(c) for c in columns]} losses for {len(ids)} sequences; give one loss a sequence")
        self._table = None
        self._losses.update(zip(ids, zip(*columns, strict=True), strict=True))

    def table(self) -> pd.DataFrame:
        """One row per sequence, columns SEQUENCE_COLUMNS, sorted by id; losses not given yet are NaN.

        Raises ValueError on an empty stream, on non-finite sums (named by sequence), and when `mean_D`
        is not the mean of the streamed tokens.
        """
        if self._table is None:
            self._table = self._summed()
        return self._table.copy()

    def _summed(self) -> pd.DataFrame:
        if not self._sums:
            raise ValueError("no batch was added; call update before table")
        frame = pd.DataFrame(torch.cat(self._sums).cpu().numpy(), columns=list(TOKEN_SUMS))
        frame.insert(0, "sequence", torch.cat(self._sequence_ids).numpy())
        frame.insert(1, "n_tokens", self._n_tokens)
        frame = frame.groupby("sequence").sum(min_count=1).reset_index()
        measured = [c for c in TOKEN_SUMS if c not in ("swd_sum", "abs_sum") or frame[c].notna().any()]
        finite_S = np.isfinite(frame[measured].to_numpy()).all(axis=1)
        broken = frame["sequence"].to_numpy()[~finite_S]
        if len(broken):
            raise ValueError(
                f"sequences {broken.tolist()[:5]} have non-finite sums (of {len(broken)} such); NaN or infinite "
                "activations, or a token exactly at mean_D: drop those sequences or repair their source"
            )
        self._check_mean(float(frame["sst"].sum()), int(frame["n_tokens"].sum()))
        losses = [self._losses.get(int(s), (np.nan,) * len(LOSSES)) for s in frame["sequence"]]
        frame[list(LOSSES)] = np.asarray(losses, dtype=float)
        return frame[list(SEQUENCE_COLUMNS)]

    def _check_mean(self, sst: float, n_tokens: int) -> None:
        drift = float(self._sum_D.square().sum()) / n_tokens
        if drift > 1e-6 * sst:
            raise ValueError(
                f"mean_D misses the streamed tokens' mean: it adds {drift / sst:.2g} of Σ‖a − ā‖² (limit 1e-6); "
                "compute mean_D over exactly the evaluated tokens"
            )

    def metrics(self) -> dict[str, float]:
        """The cell's metrics over all streamed tokens: see `metrics_from_table`."""
        mean_sq = float(self.mean_D.square().sum())
        return metrics_from_table(self.table(), d_model=self.mean_D.numel(), mean_sq=mean_sq)


def metrics_from_table(table: pd.DataFrame, *, d_model: int, mean_sq: float) -> dict[str, float]:
    """r2, r2_legacy, r2_energy, mse, cosine, relative_error, swd, abs_gdelta, nmse and, once every sequence
    has its losses, loss_orig, loss_recon, loss_zero, ce_rec, ce_loss_score.

    Args:
        table: one row per sequence, columns SEQUENCE_COLUMNS.
        d_model: D, the width of the activation.
        mean_sq: ‖ā‖², the squared norm of the mean activation (for `r2_energy`).
    """
    total = {name: float(table[name].sum(skipna=False)) for name in TOKEN_SUMS}
    n = float(table["n_tokens"].sum())
    result = {
        "r2": 1.0 - total["sse"] / _variation(total["sst"], "Σ‖a − ā‖²"),
        "r2_legacy": total["legacy_sum"] / n,
        "r2_energy": 1.0 - total["sse"] / _variation(total["sum_sq"] - n * mean_sq, "Σ‖a‖² − n‖ā‖²"),
        "mse": total["sse"] / (n * d_model),
        "cosine": total["cos_sum"] / n,
        "relative_error": total["rel_sum"] / n,
        "swd": total["swd_sum"] / n,
        "abs_gdelta": total["abs_sum"] / n,
        "nmse": total["sse"] / total["sum_sq"],
    }
    if table[list(LOSSES)].notna().all(axis=None):
        loss = {name: float(np.average(table[name], weights=table["n_tokens"])) for name in LOSSES}
        result |= loss
        result["ce_rec"] = ce_rec(loss["loss_orig"], loss["loss_recon"])
        result["ce_loss_score"] = ce_loss_score(loss["loss_orig"], loss["loss_recon"], loss["loss_zero"])
    return result
