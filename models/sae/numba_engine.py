"""The sparse step on CPUs: the screening product in torch, everything else in numba kernels.

`screen` and `batch_screen` find the active features; here are their gradients and the Adam step. Shape suffixes as in
`kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from models.cpu.threads import array, even_split, run_kernel
from models.sae import kernels
from models.sae.batch_screen import BatchScreen, Sorted
from models.sae.engines import Backend, Engine, Losses, Scratch
from models.sae.model import SAEConfig, TopKSAE
from models.sae.screen import Candidates, Screen, blocks_of, feature_split


@dataclass(frozen=True)
class Entries:
    """Active entries sorted by feature, with what the gradients need from them: `main` or auxiliary ones."""

    starts_M1: torch.Tensor
    token_E: torch.Tensor
    value_E: torch.Tensor  # h
    slope_E: torch.Tensor  # g · W_dec[j], before relu's derivative
    levels: tuple[Level, ...]

    @classmethod
    def none(cls) -> Entries:
        """No auxiliary entries."""
        no_place, no_value = torch.empty(0, dtype=torch.int32), torch.empty(0)
        return cls(no_place, no_place, no_value, no_value, ())


@dataclass(frozen=True)
class Level:
    """The features low:high and ∂L/∂x̂ of what they add to the reconstructions, in blocks of columns."""

    low: int
    high: int
    g_CBb: torch.Tensor


class NumbaEngine(Engine):
    """See the module; `n_threads` kernels run in parallel, on rows or on features."""

    name: Backend = "numba"

    def __init__(
        self,
        sae: TopKSAE,
        config: SAEConfig,
        exp_avg: dict[str, torch.Tensor],
        exp_avg_sq: dict[str, torch.Tensor],
        scratch: Scratch,
        n_threads: int,
    ) -> None:
        super().__init__(sae, config, exp_avg, exp_avg_sq, scratch)
        self.n_threads = n_threads
        self._screen = Screen(sae, scratch, n_threads)
        self._batch = BatchScreen(self._screen)
        self._touched = torch.zeros(sae.d_sae, dtype=torch.bool)
        self._square_norm = 0.0
        self._doubtful = 0.0

    @property
    def screen_dtype(self) -> torch.dtype:
        """Precision of the next screen, int8 or bfloat16."""
        return self._screen.dtype

    def refresh(self) -> None:
        self._screen.refresh()

    def derived_state(self) -> dict[str, torch.Tensor]:
        # the kernel sums a norm in another order than torch, so the sum itself is part of the state
        state = {"norm": self._screen.norm_M, "hold": torch.tensor(self._screen.hold)}
        if self.config.kind != "topk":
            state["guess"] = torch.tensor(self._batch.guess, dtype=torch.float64)
        return state

    def load_derived_state(self, state: dict[str, torch.Tensor]) -> None:
        self._screen.norm_M.copy_(state["norm"])
        self._screen.hold = int(state["hold"])
        self._batch.guess = float(state.get("guess", math.nan))
        self._screen.refresh_weights()

    @torch.no_grad()
    def gradients(self, x_BD: torch.Tensor, dead: torch.Tensor | None) -> Losses:
        sae, scratch, rows = self.sae, self.scratch, len(x_BD)
        xc = x_BD
        if self.config.apply_b_dec_to_input:
            xc = torch.sub(x_BD, sae.b_dec, out=scratch.take("xc", rows, sae.d_in))
        k_aux, weight = (0, 0.0) if dead is None else self.aux_plan(dead)
        xc_CBb = blocks_of(xc, scratch, "xc.blocks", self.n_threads)
        kept, dead_found, rescreened, least = self._kept(xc, xc_CBb, dead, k_aux)
        base = torch.zeros(1, sae.d_in) if self.config.apply_b_dec_to_input else sae.b_dec[None]
        base_CIb = blocks_of(base, scratch, "base")
        levels, errors = self._levels("main", xc_CBb, base_CIb, kept, 2 / rows, self.config.widths)
        extra, aux = Entries.none(), 0.0
        if dead is not None and dead_found is not None:
            outer = levels[-1].g_CBb
            live = torch.ones(sae.d_sae, dtype=torch.bool)
            live[dead] = False
            aux_idx, aux_h, again = self._screen.select(xc, xc_CBb, dead_found, k_aux, "aux", live)
            rescreened += again
            target = torch.mul(outer, -rows / 2, out=scratch.take("aux.target", *outer.shape))
            extra, aux = self._auxiliary(target, aux_idx, aux_h, 2 * weight / rows)
            aux *= weight
        for above, level in zip(levels[:0:-1], levels[-2::-1], strict=True):
            level.g_CBb.add_(above.g_CBb)
        main = self._entries("main", kept, levels)
        fired = self._sum_gradients(main, extra, xc_CBb)
        g_sum = levels[0].g_CBb.sum(1).flatten()[: sae.d_in]
        grad_b_dec = self.grad("b_dec").copy_(g_sum)
        if self.config.apply_b_dec_to_input:
            grad_b_dec.sub_(self.grad("b_enc") @ sae.W_enc)
        self._square_norm += float(grad_b_dec.double().square().sum())
        active = int((kept.value_E > 0).sum())
        return Losses(errors[-1], aux, active, fired, rescreened, sum(errors[:-1]), least)

    def _kept(
        self, xc_BD: torch.Tensor, xc_CBb: torch.Tensor, dead: torch.Tensor | None, k_aux: int
    ) -> tuple[Sorted, Candidates | None, int, float]:
        """The entries that the batch keeps, candidates for the auxiliary loss, the rows that were scored in full, and
        the smallest kept score of BatchTopK."""
        if self.config.kind == "topk":
            found = self._screen.candidates(xc_BD, dead, k_aux)
            idx, h, rescreened = self._screen.select(xc_BD, xc_CBb, found[0], self.config.k, "main", None)
            self._doubtful = rescreened / len(xc_BD)
            return self._sorted("main", idx, h), found[-1], rescreened, math.nan
        kept, least, rescreened = self._batch.largest(xc_BD, xc_CBb)
        self._doubtful = self._batch.doubtful
        found_dead = None if dead is None else self._screen.dead_candidates(xc_BD, dead, k_aux)
        return kept, found_dead, rescreened, least

    def _sorted(self, name: str, idx_Bk: torch.Tensor, h_Bk: torch.Tensor) -> Sorted:
        """The same number of entries of each token, by feature."""
        starts, token, slot = self._screen.sort(idx_Bk, name)
        value = self.scratch.take(f"{name}.value", h_Bk.numel())
        kernels.sort_values(*(array(part) for part in (h_Bk, slot, value)))
        return Sorted(starts, token, value)

    def _levels(
        self,
        name: str,
        target_CBb: torch.Tensor,
        base_CIb: torch.Tensor,
        kept: Sorted,
        scale: float,
        widths: Sequence[int],
    ) -> tuple[list[Level], list[float]]:
        """g = scale · (base + decoded − target) of the reconstruction by the features below each width, and the mean
        over tokens of each squared error."""
        scratch, (blocks, rows, _) = self.scratch, target_CBb.shape
        error = scratch.take("error", rows)
        span = kernels.block_span(len(kept.token_E), self.sae.d_sae)
        decoded = scratch.take(f"{name}.g", *target_CBb.shape)
        levels, errors = [], []
        for low, high in pairwise((0, *widths)):
            run_kernel(
                kernels.decode, even_split(blocks, self.n_threads), self.sae.W_dec, kept.starts_M1, kept.token_E,
                kept.value_E, decoded, low, high, span,
            )  # fmt: skip
            g = decoded
            if high < widths[-1]:
                g = scratch.take(f"{name}.g.{high}", *target_CBb.shape).copy_(decoded)
            split = even_split(rows, self.n_threads)
            run_kernel(kernels.residual, split, target_CBb, base_CIb, np.float32(scale), g, error)
            levels.append(Level(low, high, g))
            errors.append(float(error.sum(dtype=torch.float64)) / rows)
        return levels, errors

    def _auxiliary(
        self, target_CBb: torch.Tensor, idx_Bk: torch.Tensor, h_Bk: torch.Tensor, scale: float
    ) -> tuple[Entries, float]:
        """The entries of dead features that reconstruct the target, and the mean over tokens of their squared error."""
        kept = self._sorted("aux", idx_Bk, h_Bk)
        zero = blocks_of(torch.zeros(1, self.sae.d_in), self.scratch, "base")
        levels, errors = self._levels("aux", target_CBb, zero, kept, scale, (self.sae.d_sae,))
        return self._entries("aux", kept, levels), errors[0]

    def _entries(self, name: str, kept: Sorted, levels: Sequence[Level]) -> Entries:
        """The kept entries with their slopes."""
        slope = self.scratch.take(f"{name}.slope", len(kept.token_E))
        span = kernels.block_span(len(slope), self.sae.d_sae)
        for level in levels:
            bounds = feature_split(kept.starts_M1, self.n_threads, level.low, level.high)
            run_kernel(
                kernels.feature_dots, bounds, level.g_CBb, self.sae.W_dec, kept.starts_M1, kept.token_E, slope, span
            )
        return Entries(kept.starts_M1, kept.token_E, kept.value_E, slope, tuple(levels))

    def _sum_gradients(self, main: Entries, extra: Entries, xc_CBb: torch.Tensor) -> torch.Tensor:
        """Write the gradients of W_dec, W_enc and b_enc and their squared norm; returns which features fired."""
        M = self.sae.d_sae
        load = main.starts_M1 + extra.starts_M1 if len(extra.starts_M1) else main.starts_M1
        fired = torch.empty(M, dtype=torch.bool)
        square = self.scratch.take("square", M, dtype=torch.float64)
        run_kernel(
            kernels.settle_entries, feature_split(load, self.n_threads), main.starts_M1, main.value_E, main.slope_E,
            extra.starts_M1, extra.slope_E, self.grad("b_enc"), self._touched, fired, square,
        )  # fmt: skip
        span = kernels.block_span(int(load[-1]), M)
        aux_g = extra.levels[0].g_CBb if extra.levels else torch.empty(0, 0, 0)
        whole = (Level(0, M, xc_CBb),)
        for name, levels, aux_CBb, values, aux_values in (
            ("W_dec", main.levels, aux_g, main.value_E, extra.value_E),
            ("W_enc", whole, xc_CBb, main.slope_E, extra.slope_E),
        ):
            for level in levels:
                bounds = feature_split(load, self.n_threads, level.low, level.high)
                run_kernel(
                    kernels.feature_sums, bounds, level.g_CBb, main.starts_M1, main.token_E, values,
                    aux_CBb, extra.starts_M1, extra.token_E, aux_values, self.grad(name), square, span,
                )  # fmt: skip
        self._square_norm = float(square.sum())
        return fired

    def gradient(self, name: str) -> torch.Tensor:
        grad = self.grad(name)
        return grad.masked_fill(~self._touched[:, None], 0) if grad.ndim == 2 else grad

    def grad_norm(self) -> float:
        return self._square_norm**0.5

    @torch.no_grad()
    def update(self, lr: float, step: int, grad_norm: float) -> None:
        sae, config = self.sae, self.config
        clip = min(1.0, config.clip_norm / (grad_norm + 1e-6))
        beta1, beta2 = config.betas
        numbers = [
            np.float32(number)
            for number in (
                clip,
                beta1,
                beta2,
                lr / (1 - beta1**step),
                (1 - beta2**step) ** -0.5,
                config.eps,
            )
        ]
        self._screen.judge(self._doubtful)
        screen = self._screen
        parts = [
            value
            for name in ("W_enc", "W_dec")
            for value in (getattr(sae, name), self.exp_avg[name], self.exp_avg_sq[name], self.grad(name))
        ]
        run_kernel(
            kernels.adam_features, even_split(sae.d_sae, self.n_threads), *parts, self._touched,
            config.rescale_acts_by_decoder_norm, screen.norm_M, screen.low_MD(), screen.scale_M, *numbers,
        )  # fmt: skip
        for name in ("b_enc", "b_dec"):
            vectors = (getattr(sae, name), self.exp_avg[name], self.exp_avg_sq[name], self.grad(name))
            kernels.adam_vector(*(array(vector) for vector in vectors), *numbers)
