"""One training step of an SAE, the dense way and the sparse way in torch operations.

Shape suffixes: B tokens, D = d_in, M = d_sae, k active features, K > k screened candidates, E = B·k entries.

With n = ‖W_dec‖ by rows, a = W_enc (x − b_dec) + b_enc, h = relu(a) on the k largest a·n of a token, and the loss
L = Σ_b ‖x̂_b − x_b‖² / B, the gradients need the active entries alone (g = ∂L/∂x̂ = 2 (x̂ − x) / B):

    ∂W_dec[j] = Σ_b h_bj g_b        dh_bj = (g_b · W_dec[j]) [h_bj > 0]       ∂W_enc[j] = Σ_b dh_bj (x_b − b_dec)
    ∂b_enc[j] = Σ_b dh_bj           ∂b_dec = Σ_b g_b − W_encᵀ ∂b_enc

The norms scale h up in the encoder and down in the decoder, so their own gradient is exactly zero. The auxiliary
loss (Gao et al. 2024, appendix A.2; SAELens' variant without variance normalisation) lets the n_aux dead features
with the largest a·n reconstruct e = x − x̂, without bias and without relu:
L_aux = c · min(#dead / n_aux, 1) · Σ_b ‖Σ_j a_bj W_dec[j] − e_b‖² / B, with e held constant.

BatchTopK keeps the k·B largest positive a·n of the whole batch instead of k per token; the equations stay. Matryoshka
adds the same squared error of x̂^w, the reconstruction by the features below w, for each width w. Then the gradient g
of feature j is the sum of g^w = 2 (x̂^w − x) / B over the widths that hold it (w > j); b_dec gets the sum over all.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from torch.nn import functional as F

from models.cpu.adam import Adam
from models.sae.model import SAEConfig, TopKSAE, row_chunks
from models.sae.precision import bfloat16_is_faster

Backend = Literal["numba", "torch", "dense"]
PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")
ROOM = 32  # rows in doubt that a step on an accelerator has room for at first
CERTIFICATE = 5.0  # screening errors (root mean square of the row) that must fit between k-th score and screen floor


class Scratch:
    """Named buffers that live as long as the bank and grow to the largest request.

    Large temporaries made anew in each step cost more in page faults than in arithmetic, hence their reuse; SAEs
    that train one after another on the same machine share one Scratch.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._flat: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Uninitialised contiguous tensor of `shape`; the next `take` of the same name overwrites it."""
        size = math.prod(shape)
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < size:
            self._flat.pop((name, dtype), None)
            flat = self._flat[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return flat[:size].view(shape)

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(flat.nbytes for flat in self._flat.values())


Number = float | torch.Tensor


@dataclass(frozen=True)
class Losses:
    """What one pass over a batch returns besides the gradients; numbers may still be on their way (see `on_host`)."""

    mse: Number  # Σ ‖x̂ − x‖² / B
    aux: Number  # the weighted auxiliary loss
    active: Number  # entries with h > 0
    fired_M: torch.Tensor  # bool, features with h > 0 for some token
    rescreened: Number  # rows (main and auxiliary) that were scored again in float32: the screen was too close
    inner: Number = 0.0  # Matryoshka: Σ_w Σ ‖x̂^w − x‖² / B over the widths below d_sae
    least: Number = math.nan  # BatchTopK: the smallest positive a·n that was kept; NaN where none was
    doubtful: Number = 0  # the most rows that one selection left in doubt (see `Engine.settled`)


def on_host(*values: Number) -> list[float]:
    """The values as numbers. Those on an accelerator come in one transfer (in float32): the host waits for it once."""
    far = {i: x for i, x in enumerate(values) if isinstance(x, torch.Tensor) and x.device.type != "cpu"}
    numbers = torch.stack([x.float() for x in far.values()]).tolist() if far else []
    fetched = dict(zip(far, numbers, strict=True))
    return [fetched[i] if i in fetched else float(x) for i, x in enumerate(values)]


def n_candidates(k: int, features: int, least: int = 16) -> int:
    """Candidates K that a screen keeps for k wanted: a margin of max(least, k·least/64), a multiple of 4.

    A wider margin costs a few dot products, a narrow one a full float32 scoring of every row it leaves in doubt.
    """
    return min(features, -(-(k + max(least, k * least // 64)) // 4) * 4)


class Engine:
    """Gradients of one SAE on one batch, and its Adam step; the subclasses differ in how they get the gradients.

    `exp_avg` and `exp_avg_sq` are Adam's moments by parameter name, updated in place.
    """

    name: Backend
    waits = True  # whether the host may ask the device for numbers in the middle of a step

    def __init__(
        self,
        sae: TopKSAE,
        config: SAEConfig,
        exp_avg: dict[str, torch.Tensor],
        exp_avg_sq: dict[str, torch.Tensor],
        scratch: Scratch,
    ) -> None:
        self.sae, self.config, self.scratch = sae, config, scratch
        self.exp_avg, self.exp_avg_sq = exp_avg, exp_avg_sq

    @cached_property
    def _adam(self) -> Adam:
        parameters = [getattr(self.sae, name) for name in PARAMETERS]
        return Adam(parameters, betas=self.config.betas, eps=self.config.eps, fused=True)

    def grad(self, name: str) -> torch.Tensor:
        """Gradient buffer of a parameter, valid from `gradients` to the next use of the scratch."""
        return self.scratch.take(f"grad.{name}", *getattr(self.sae, name).shape)

    def gradient(self, name: str) -> torch.Tensor:
        """The whole gradient of a parameter, for comparison (an engine may leave rows of `grad` unwritten)."""
        return self.grad(name)

    def gradients(self, x_BD: torch.Tensor, dead: torch.Tensor | None) -> Losses:
        """Fill the gradient buffers for the batch x; `dead` holds the indices of dead features, or None."""
        raise NotImplementedError

    def settled(self, doubtful: int) -> bool:
        """Whether the last gradients are right, given `Losses.doubtful`; if not, the next call of `gradients` is."""
        return True

    def grad_norm(self) -> Number:
        """Euclidean norm of the whole gradient."""
        return torch.nn.utils.get_total_norm([self.grad(name) for name in PARAMETERS])

    def update(self, lr: float, step: int, grad_norm: float) -> None:
        """Clip the gradient to `clip_norm` and take Adam's step number `step` (from 1) with rate `lr`."""
        parameters = [getattr(self.sae, name) for name in PARAMETERS]
        for name, parameter in zip(PARAMETERS, parameters, strict=True):
            parameter.grad = self.grad(name)
            self._adam.state[parameter] = {
                # filled there: a number that is copied to an accelerator makes the host wait
                "step": torch.full((), float(step - 1), device=parameter.device),
                "exp_avg": self.exp_avg[name],
                "exp_avg_sq": self.exp_avg_sq[name],
            }
        total = torch.full((), grad_norm, device=parameters[0].device)
        torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, total)
        self._adam.param_groups[0]["lr"] = lr
        self._adam.step()
        for parameter in parameters:
            parameter.grad = None

    def refresh(self) -> None:
        """Recompute what is derived from the weights after they were changed from outside."""

    def derived_state(self) -> dict[str, torch.Tensor]:
        """Derived values that a resumed run needs to go on bit for bit."""
        return {}

    def load_derived_state(self, state: dict[str, torch.Tensor]) -> None:
        """Counterpart of `derived_state`."""
        self.refresh()

    def aux_plan(self, dead: torch.Tensor) -> tuple[int, float]:
        """Dead features that a token may use, and the weight of the auxiliary loss, given the dead ones."""
        n_aux = self.config.n_aux
        return min(n_aux, len(dead)), self.config.aux_coefficient * min(len(dead) / n_aux, 1.0)


class DenseEngine(Engine):
    """The reference: the equations over all features, differentiated by autograd. Slow but simple."""

    name: Backend = "dense"

    def gradients(self, x_BD: torch.Tensor, dead: torch.Tensor | None) -> Losses:
        leaves = {name: getattr(self.sae, name).detach().requires_grad_() for name in PARAMETERS}
        with torch.enable_grad():
            W_enc, W_dec, b_enc, b_dec = (leaves[name] for name in PARAMETERS)
            xc = x_BD - b_dec if self.config.apply_b_dec_to_input else x_BD
            norm = W_dec.norm(dim=-1) if self.config.rescale_acts_by_decoder_norm else torch.ones_like(b_enc)
            scores = (xc @ W_enc.T + b_enc) * norm
            h = self._kept(scores)
            x_hat = (h / norm) @ W_dec + b_dec
            mse = (x_hat - x_BD).square().sum(-1).mean()
            aux, inner = torch.zeros_like(mse), torch.zeros_like(mse)
            for width in self.config.widths[:-1]:
                x_hat_w = (h[:, :width] / norm[:width]) @ W_dec[:width] + b_dec
                inner = inner + (x_hat_w - x_BD).square().sum(-1).mean()
            if dead is not None:
                k_aux, weight = self.aux_plan(dead)
                residual = (x_BD - x_hat).detach()
                dead_top = scores[:, dead].topk(k_aux, dim=-1, sorted=False)
                a = torch.zeros_like(scores).scatter(-1, dead[dead_top.indices], dead_top.values)
                aux = weight * ((a / norm) @ W_dec - residual).square().sum(-1).mean()
            grads = torch.autograd.grad(mse + inner + aux, list(leaves.values()))
        for name, grad in zip(leaves, grads, strict=True):
            self.grad(name).copy_(grad)
        active = h > 0
        least = float(h[active].detach().min()) if self.config.kind != "topk" and bool(active.any()) else math.nan
        count, fired_M = int(active.sum()), active.any(dim=0)
        return Losses(mse.item(), aux.item(), count, fired_M, 0, inner.item(), least)

    def _kept(self, scores_BM: torch.Tensor) -> torch.Tensor:
        """h [B, M]: the relu of the kept scores, zero elsewhere."""
        k = self.config.k
        if self.config.kind == "topk":
            top = scores_BM.topk(k, dim=-1, sorted=False)
            return torch.zeros_like(scores_BM).scatter(-1, top.indices, top.values.relu())
        flat = scores_BM.relu().flatten()
        best = flat.topk(k * len(scores_BM), sorted=False)
        return torch.zeros_like(flat).scatter(-1, best.indices, best.values).view_as(scores_BM)


def screen_dtype(device: torch.device) -> torch.dtype:
    """Precision of the torch backend's screen: bfloat16 on CUDA, and on a CPU where it is measured to be faster."""
    faster = device.type == "cuda" or (device.type == "cpu" and bfloat16_is_faster())
    return torch.bfloat16 if faster else torch.float32


def dots(x_BD: torch.Tensor, W_MD: torch.Tensor, idx_Bk: torch.Tensor) -> torch.Tensor:
    """[B, k] of x_b · W[idx_bq], in float32, without gathering the rows."""
    rows, k = idx_Bk.shape
    offsets = torch.arange(0, rows * k, k, device=x_BD.device)
    bag = torch.arange(rows, device=x_BD.device).repeat_interleave(k)
    out = torch.ops.aten._embedding_bag_per_sample_weights_backward(x_BD, W_MD, idx_Bk.flatten(), offsets, bag, 0)
    return out.view(rows, k)


def grouped_topk(scores_RM: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices [R, k] of the k largest of each row, in no particular order.

    `topk` visits every score several times. The k largest lie in the k groups with the largest maxima, so that it is
    asked for groups first and for their members then, in all about 2·√(k·M) scores a row.
    """
    rows, features = scores_RM.shape
    size = 2 ** max(0, round(math.log2(features / k) / 2))
    if size == 1 or features % size:
        values, indices = scores_RM.topk(k, dim=-1, sorted=False)
        return values, indices
    groups = features // size
    members = scores_RM.view(rows, size, groups)
    best_Rk = members.amax(1).topk(k, dim=-1, sorted=False).indices
    inside = members.gather(2, best_Rk[:, None, :].expand(rows, size, k)).flatten(1)
    values, at_Rk = inside.topk(k, dim=-1, sorted=False)
    return values, best_Rk.gather(1, at_Rk % k) + at_Rk // k * groups


def exact_topk(
    sae: TopKSAE, xc_BD: torch.Tensor, norm_M: torch.Tensor, k: int, live_M: torch.Tensor | None
) -> torch.Tensor:
    """Indices [B, k] of the k largest float32 a·n, leaving out the features that `live_M` marks, when given."""
    idx = torch.empty(len(xc_BD), k, dtype=torch.int64, device=xc_BD.device)
    for rows in row_chunks(len(xc_BD), 4 * sae.d_sae):
        scores = torch.addmm(sae.b_enc, xc_BD[rows], sae.W_enc.T).mul_(norm_M)
        if live_M is not None:
            scores.masked_fill_(live_M, -torch.inf)
        idx[rows] = scores.topk(k, dim=-1, sorted=False).indices
    return idx


@dataclass(frozen=True)
class Level:
    """The features low:high of a dictionary and g [B, D], the gradient of what they add to the reconstruction."""

    low: int
    high: int
    g_BD: torch.Tensor


@dataclass(frozen=True)
class Kept:
    """Entries that tokens keep, row by row: how many each token has, their features and their h (or a)."""

    counts_B: torch.Tensor
    index_E: torch.Tensor
    value_E: torch.Tensor

    @classmethod
    def of(cls, idx_Bk: torch.Tensor, value_Bk: torch.Tensor) -> Kept:
        """The same number for every token."""
        rows, k = idx_Bk.shape
        return cls(torch.full((rows,), k, device=idx_Bk.device), idx_Bk.flatten(), value_Bk.flatten())

    def tokens(self) -> torch.Tensor:
        """The token of each entry [E]."""
        rows = torch.arange(len(self.counts_B), device=self.index_E.device)
        return rows.repeat_interleave(self.counts_B, output_size=len(self.index_E))

    def within(self, low: int, high: int, d_sae: int) -> Kept:
        """Only the entries of the features low:high of d_sae."""
        if (low, high) == (0, d_sae):
            return self
        mine = (self.index_E >= low) & (self.index_E < high)
        counts_B = torch.bincount(self.tokens()[mine], minlength=len(self.counts_B))
        return Kept(counts_B, self.index_E[mine], self.value_E[mine])

    def decode(self, W_MD: torch.Tensor) -> torch.Tensor:
        """Σ value · W[index] of every token [B, D]."""
        offsets = self.counts_B.cumsum(0) - self.counts_B
        return F.embedding_bag(self.index_E, W_MD, offsets, mode="sum", per_sample_weights=self.value_E)


class TorchEngine(Engine):
    """The sparse step in torch operations alone, for any device.

    `screen_dtype` is the precision of the [B, d_sae] product that finds the candidates: bfloat16 where the device
    multiplies it faster. Candidates are scored again in float32, and a row whose screen leaves less than
    CERTIFICATE times its own measured error between the k-th score and the first one left out is scored in full,
    so that the support is the dense step's.

    On an accelerator the host must not wait for numbers (`waits` is False), except once at the end of a step. How many
    rows are in doubt is not known until then: `room` rows are scored in full, those in doubt first, and if there were
    more, the step begins anew with more room. Only rows in doubt take what the full scoring says, so the room does not
    decide the result. (BatchTopK and Matryoshka still wait.)
    """

    name: Backend = "torch"

    def __init__(
        self,
        sae: TopKSAE,
        config: SAEConfig,
        exp_avg: dict[str, torch.Tensor],
        exp_avg_sq: dict[str, torch.Tensor],
        scratch: Scratch,
        screen_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(sae, config, exp_avg, exp_avg_sq, scratch)
        self.screen_dtype = screen_dtype
        self.waits, self.room = scratch.device.type == "cpu", ROOM
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

    @torch.no_grad()
    def gradients(self, x_BD: torch.Tensor, dead: torch.Tensor | None) -> Losses:
        sae, rows = self.sae, len(x_BD)
        xc = sae.centred(x_BD)
        norm = sae.decoder_norms()
        by_token = self.config.kind == "topk"
        wanted: list[tuple[int, torch.Tensor | None]] = [(self.config.k, None)] if by_token else []
        screens = self._screen(xc, norm, wanted if dead is None else [*wanted, (self.aux_plan(dead)[0], dead)])
        rescreened: Number = 0
        least: Number = math.nan
        if by_token:
            idx, a, rescreened = self._select(xc, norm, screens[0], self.config.k, sae.d_sae)
            kept = Kept.of(idx, a.relu_())
        else:
            kept, least = self._largest_of_batch(xc, norm)
        positive_E = kept.value_E > 0
        fired = torch.zeros(sae.d_sae + 1, dtype=torch.bool, device=x_BD.device)
        fired.index_fill_(0, torch.where(positive_E, kept.index_E, sae.d_sae), True)
        levels = self._errors(kept, x_BD)
        squares = [level.g_BD.square().sum() / rows for level in levels]
        residual = levels[-1].g_BD.neg() if dead is not None else None
        for level in levels:
            level.g_BD.mul_(2 / rows)
        for above, level in zip(levels[:0:-1], levels[-2::-1], strict=True):
            level.g_BD.add_(above.g_BD)
        self._scatter(kept, levels, xc, relu=True)
        g_sum = levels[0].g_BD.sum(0)
        aux: Number = 0.0
        again: Number = 0
        if dead is not None and residual is not None:
            k_aux, weight = self.aux_plan(dead)
            live_M = torch.ones(sae.d_sae, dtype=torch.bool, device=x_BD.device).index_fill_(0, dead, False)
            idx, a, again = self._select(xc, norm, screens[-1], k_aux, len(dead), live_M)
            g = F.embedding_bag(idx, sae.W_dec, mode="sum", per_sample_weights=a).sub_(residual)
            aux = weight * g.square().sum() / rows
            whole = [Level(0, sae.d_sae, g.mul_(2 * weight / rows))]
            self._scatter(Kept.of(idx, a), whole, xc, relu=False)
        grad_b_dec = self.grad("b_dec").copy_(g_sum)
        if self.config.apply_b_dec_to_input:
            grad_b_dec.sub_(self.grad("b_enc") @ sae.W_enc)
        inner = sum(squares[:-1])
        counts = [count for count in (rescreened, again) if isinstance(count, torch.Tensor)]
        doubtful = torch.stack(counts).amax() if counts else 0
        return Losses(squares[-1], aux, positive_E.sum(), fired[:-1], rescreened + again, inner, least, doubtful)

    def settled(self, doubtful: int) -> bool:
        if self.waits or doubtful <= self.room:
            return True
        self.room = 1 << (doubtful - 1).bit_length()
        return False

    def derived_state(self) -> dict[str, torch.Tensor]:
        # how many rows a product has may decide its last bits
        return {} if self.waits else {"room": torch.tensor(self.room)}

    def load_derived_state(self, state: dict[str, torch.Tensor]) -> None:
        self.room = int(state.get("room", ROOM))

    def _errors(self, kept: Kept, x_BD: torch.Tensor) -> list[Level]:
        """x̂^w − x of each nested reconstruction (one unless Matryoshka)."""
        sae = self.sae
        levels: list[Level] = []
        decoded: torch.Tensor = sae.b_dec
        for low, high in pairwise((0, *self.config.widths)):
            decoded = kept.within(low, high, sae.d_sae).decode(sae.W_dec).add_(decoded)
            levels.append(Level(low, high, decoded - x_BD))
        return levels

    def _largest_of_batch(self, xc_BD: torch.Tensor, norm_M: torch.Tensor) -> tuple[Kept, float]:
        """The k·B largest positive a·n of the batch, and the smallest of them (NaN where there is none).

        Scored in float32 a block of rows at a time; of equal scores those of earlier rows are kept.
        """
        sae, wanted = self.sae, self.config.k * len(xc_BD)
        at_E = torch.empty(0, dtype=torch.int64, device=xc_BD.device)
        a_E, score_E = (torch.empty(0, device=xc_BD.device) for _ in range(2))
        least = 0.0
        for rows in row_chunks(len(xc_BD), 4 * sae.d_sae):
            a = torch.addmm(sae.b_enc, xc_BD[rows], sae.W_enc.T).flatten()
            scores = a.view(-1, sae.d_sae).mul(norm_M).flatten()
            more = (scores > least).nonzero().flatten()
            at_E = torch.cat([at_E, more + rows.start * sae.d_sae])
            a_E, score_E = torch.cat([a_E, a[more]]), torch.cat([score_E, scores[more]])
            if len(score_E) > wanted:
                best = score_E.topk(wanted, sorted=False).indices.sort().values
                at_E, a_E, score_E = at_E[best], a_E[best], score_E[best]
                least = float(score_E.min())
        found = float(score_E.min()) if len(score_E) else math.nan
        counts_B = torch.bincount(at_E // sae.d_sae, minlength=len(xc_BD))
        return Kept(counts_B, at_E % sae.d_sae, a_E), found

    def _screen(
        self, xc_BD: torch.Tensor, norm_M: torch.Tensor, wanted: Sequence[tuple[int, torch.Tensor | None]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Candidates [B, K] and their low-precision scores for each (k, features to choose from; None: all)."""
        sae, rows = self.sae, len(xc_BD)
        if not wanted:
            return []
        exact = self.screen_dtype == torch.float32
        sizes = [k if exact else n_candidates(k, sae.d_sae if own is None else len(own)) for k, own in wanted]
        device = xc_BD.device
        found = [
            (torch.empty(rows, K, dtype=torch.int64, device=device), torch.empty(rows, K, device=device)) for K in sizes
        ]
        W = self.scratch.take("screen.W", sae.d_sae, sae.d_in, dtype=self.screen_dtype)
        torch.mul(sae.W_enc, norm_M[:, None], out=W)
        bias = (sae.b_enc * norm_M).to(self.screen_dtype)
        x = xc_BD.to(self.screen_dtype)
        for chunk in row_chunks(rows, W.element_size() * sae.d_sae):
            scores = self.scratch.take("screen.scores", chunk.stop - chunk.start, sae.d_sae, dtype=W.dtype)
            torch.addmm(bias, x[chunk], W.T, out=scores)
            for (cand, values), K, (_, features) in zip(found, sizes, wanted, strict=True):
                best, at = grouped_topk(scores if features is None else scores[:, features], K)
                cand[chunk] = at if features is None else features[at]
                values[chunk] = best.float()
        return found

    def _select(
        self,
        xc_BD: torch.Tensor,
        norm_M: torch.Tensor,
        screen: tuple[torch.Tensor, torch.Tensor],
        k: int,
        features: int,
        live_M: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, Number]:
        """Support [B, k] and its a [B, k] from the screened candidates of so many features, those that `live_M` marks
        left out; and how many rows were in doubt."""
        sae, (cand, screened) = self.sae, screen
        a = dots(xc_BD, sae.W_enc, cand).add_(sae.b_enc[cand])
        if cand.shape[1] == k:
            return cand, a, 0
        scores = a * norm_M[cand]
        top = scores.topk(k, dim=-1, sorted=False)
        idx, a = cand.gather(1, top.indices), a.gather(1, top.indices)
        if cand.shape[1] == features:
            return idx, a, 0
        error = (scores - screened).square().mean(-1).sqrt()
        gap = top.values.amin(-1) - screened.amin(-1)
        close_B = gap < CERTIFICATE * error
        if self.waits:
            close_R = close_B.nonzero().flatten()
        else:
            close_R = close_B.float().topk(min(self.room, len(close_B)), sorted=False).indices
        if len(close_R):
            x_RD, sure_R1 = xc_BD[close_R], close_B[close_R, None]
            exact = exact_topk(sae, x_RD, norm_M, k, live_M)
            a_exact = dots(x_RD, sae.W_enc, exact).add_(sae.b_enc[exact])
            idx.index_copy_(0, close_R, torch.where(sure_R1, exact, idx[close_R]))
            a.index_copy_(0, close_R, torch.where(sure_R1, a_exact, a[close_R]))
        return idx, a, close_B.sum()

    def _scatter(self, kept: Kept, levels: Sequence[Level], xc_BD: torch.Tensor, *, relu: bool) -> None:
        """Sum the entries into the gradients of W_dec, W_enc and b_enc: the main ones, with relu, come first, and the
        auxiliary ones are added to them. `levels` cover all features and hold the gradient of each one's x̂."""
        W_dec, M, rows = self.sae.W_dec, self.sae.d_sae, len(kept.counts_B)
        feature, order = torch.sort(kept.index_E, stable=True)
        starts = torch.searchsorted(feature, torch.arange(M + 1, device=feature.device))
        token, h = kept.tokens()[order], kept.value_E[order]
        bounds = starts.tolist() if len(levels) > 1 else [0] * M + [len(token)]
        dh = torch.empty_like(h)
        for level in levels:
            own, low = slice(bounds[level.low], bounds[level.high]), level.low
            # one bag per feature: the table that is read at random is g, smaller than W_dec by B / d_sae
            dh[own] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                W_dec[low : level.high], level.g_BD, token[own], starts[low : level.high] - own.start,
                feature[own] - low, 0,
            )  # fmt: skip
        if relu:
            dh.mul_(h > 0)
        whole = Level(0, M, xc_BD)
        for name, values, parts in (("W_dec", h, levels), ("W_enc", dh, [whole])):
            for level in parts:
                own = slice(bounds[level.low], bounds[level.high])
                shape = (level.high - level.low, rows)
                entries = torch.sparse_csr_tensor(
                    starts[level.low : level.high + 1] - own.start, token[own], values[own], shape,
                    check_invariants=False,
                )  # fmt: skip
                grad = self.grad(name)[level.low : level.high]
                if relu:
                    torch.mm(entries, level.g_BD, out=grad)
                else:
                    torch.addmm(grad, entries, level.g_BD, out=grad)
        # a bag per feature again: on an accelerator index_add_ sums in no fixed order
        places = torch.arange(len(dh), device=dh.device)
        sums_M = F.embedding_bag(places, dh[:, None], starts[:-1], mode="sum").flatten()
        grad_b = self.grad("b_enc")
        grad_b.copy_(sums_M if relu else grad_b + sums_M)
