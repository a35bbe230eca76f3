"""The sparse step on CPUs: the screening product in torch, everything else in numba kernels.

`topk_screen` finds the active features; here are their gradients and the Adam step. Shape suffixes as in
`topk_kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from models.cpu.threads import array, even_split, run_kernel
from models.sae import kernels
from models.sae.engines import Backend, Engine, Losses, Scratch
from models.sae.model import SAEConfig, TopKSAE
from models.sae.screen import Screen, blocks_of, feature_split


@dataclass(frozen=True)
class Entries:
    """Active entries sorted by feature (`kernels.sort_entries`), and what the gradients need from them."""

    g_CBb: torch.Tensor  # ∂L/∂x̂ in blocks of columns
    starts_M1: torch.Tensor
    token_E: torch.Tensor
    value_E: torch.Tensor  # h
    slope_E: torch.Tensor  # g · W_dec[j], before relu's derivative


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
        return {"norm": self._screen.norm_M, "hold": torch.tensor(self._screen.hold)}

    def load_derived_state(self, state: dict[str, torch.Tensor]) -> None:
        self._screen.norm_M.copy_(state["norm"])
        self._screen.hold = int(state["hold"])
        self._screen.refresh_weights()

    @torch.no_grad()
    def gradients(self, x_BD: torch.Tensor, dead: torch.Tensor | None) -> Losses:
        sae, scratch, rows = self.sae, self.scratch, len(x_BD)
        M, k = sae.d_sae, self.config.k
        xc = x_BD
        if self.config.apply_b_dec_to_input:
            xc = torch.sub(x_BD, sae.b_dec, out=scratch.take("xc", rows, sae.d_in))
        k_aux, weight = (0, 0.0) if dead is None else self.aux_plan(dead)
        xc_CBb = blocks_of(xc, scratch, "xc.blocks", self.n_threads)
        found = self._screen.candidates(xc, dead, k_aux)
        idx, h, rescreened = self._screen.select(xc, xc_CBb, found[0], k, "main", None)
        base = torch.zeros(1, sae.d_in) if self.config.apply_b_dec_to_input else sae.b_dec[None]
        main, mse = self._entries("main", xc_CBb, base, idx, h, 2 / rows)
        none_i, none_f = torch.empty(0, dtype=torch.int32), torch.empty(0)
        extra, aux = Entries(torch.empty(0, 0, 0), none_i, none_i, none_f, none_f), 0.0
        load = main.starts_M1
        if dead is not None:
            live = torch.ones(M, dtype=torch.bool)
            live[dead] = False
            aux_idx, aux_h, again = self._screen.select(xc, xc_CBb, found[1], k_aux, "aux", live.nonzero().flatten())
            rescreened += again
            target = torch.mul(main.g_CBb, -rows / 2, out=scratch.take("aux.target", *main.g_CBb.shape))
            extra, aux = self._entries("aux", target, torch.zeros(1, sae.d_in), aux_idx, aux_h, 2 * weight / rows)
            aux *= weight
            load = load + extra.starts_M1
        fired = torch.empty(M, dtype=torch.bool)
        square = scratch.take("square", M, dtype=torch.float64)
        bounds = feature_split(load, self.n_threads)
        run_kernel(
            kernels.settle_entries, bounds, main.starts_M1, main.value_E, main.slope_E, extra.starts_M1,
            extra.slope_E, self.grad("b_enc"), self._touched, fired, square,
        )  # fmt: skip
        span = kernels.block_span(int(load[-1]), M)
        for name, rows_CBb, aux_CBb, values, aux_values in (
            ("W_dec", main.g_CBb, extra.g_CBb, main.value_E, extra.value_E),
            ("W_enc", xc_CBb, xc_CBb, main.slope_E, extra.slope_E),
        ):
            run_kernel(
                kernels.feature_sums, bounds, rows_CBb, main.starts_M1, main.token_E, values,
                aux_CBb, extra.starts_M1, extra.token_E, aux_values, self.grad(name), square, span,
            )  # fmt: skip
        g_sum = main.g_CBb.sum(1).flatten()[: sae.d_in]
        grad_b_dec = self.grad("b_dec").copy_(g_sum)
        if self.config.apply_b_dec_to_input:
            grad_b_dec.sub_(self.grad("b_enc") @ sae.W_enc)
        self._doubtful = rescreened / rows
        self._square_norm = float(square.sum()) + float(grad_b_dec.double().square().sum())
        return Losses(mse, aux, int((h > 0).sum()), fired, rescreened)

    def gradient(self, name: str) -> torch.Tensor:
        grad = self.grad(name)
        return grad.masked_fill(~self._touched[:, None], 0) if grad.ndim == 2 else grad

    def _entries(
        self,
        name: str,
        target_CBb: torch.Tensor,
        base_1D: torch.Tensor,
        idx_Bk: torch.Tensor,
        h_Bk: torch.Tensor,
        scale: float,
    ) -> tuple[Entries, float]:
        """The entries by feature with g = scale · (base + decoded − target), and the mean over tokens of the squared
        error."""
        scratch, W_dec = self.scratch, self.sae.W_dec
        blocks, rows, _ = target_CBb.shape
        starts, token, slot = self._screen.sort(idx_Bk, name)
        value = scratch.take(f"{name}.value", h_Bk.numel())
        kernels.sort_values(*(array(part) for part in (h_Bk, slot, value)))
        g = scratch.take(f"{name}.g", *target_CBb.shape)
        error = scratch.take("error", rows)
        base = blocks_of(base_1D, scratch, "base")
        span = kernels.block_span(len(token), self.sae.d_sae)
        run_kernel(kernels.decode, even_split(blocks, self.n_threads), W_dec, starts, token, value, g, span)
        run_kernel(kernels.residual, even_split(rows, self.n_threads), target_CBb, base, np.float32(scale), g, error)
        slope = self._screen.dots(g, W_dec, starts, token, f"{name}.slope")
        return Entries(g, starts, token, value, slope), float(error.sum(dtype=torch.float64)) / rows

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
