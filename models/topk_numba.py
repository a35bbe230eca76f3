"""The sparse step on CPUs: the screening product in torch, everything else in numba kernels.

`topk_screen` finds the active features; here are their gradients and the Adam step. Shape suffixes as in
`topk_kernels`.
"""

from __future__ import annotations

import numpy as np
import torch

from models import topk_kernels as kernels
from models.topk_engines import Backend, Engine, Losses, Scratch
from models.topk_model import SAEConfig, TopKSAE
from models.topk_screen import Screen, array, even_split, run_kernel


class NumbaEngine(Engine):
    """See the module; `n_threads` kernels run side by side, on rows or on features."""

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
        screens = self._screen.candidates(xc, dead, k_aux)
        idx, h, rescreened = self._screen.select(xc, screens[0], k, "main", None)
        g, mse = self._residual("main", x_BD, sae.b_dec, idx, h, 2 / rows)
        starts, token, value = self._sorted("main", idx, h)
        g_sum = g.sum(0)
        empty_f, empty_i = torch.empty(0), torch.empty(0, dtype=torch.int32)
        aux, aux_parts = 0.0, (torch.empty(0, sae.d_in), empty_i, empty_i, empty_f)
        if dead is not None:
            live = torch.ones(M, dtype=torch.bool)
            live[dead] = False
            aux_idx, aux_h, again = self._screen.select(xc, screens[1], k_aux, "aux", live.nonzero().flatten())
            rescreened += again
            target = torch.mul(g, -rows / 2, out=scratch.take("aux.target", rows, sae.d_in))
            zero = torch.zeros(sae.d_in)
            g_aux, aux = self._residual("aux", target, zero, aux_idx, aux_h, 2 * weight / rows)
            aux *= weight
            aux_parts = (g_aux, *self._sorted("aux", aux_idx, aux_h))
        fired = torch.empty(M, dtype=torch.bool)
        square = scratch.take("square", M, dtype=torch.float64)
        load = starts + aux_parts[1] if dead is not None else starts
        bounds = np.searchsorted(load.numpy(), even_split(int(load[-1]), self.n_threads)).tolist()
        bounds[0], bounds[-1] = 0, M
        run_kernel(
            kernels.feature_gradients, bounds, sae.W_dec, xc, g, starts, token, value, *aux_parts,
            self.grad("W_dec"), self.grad("W_enc"), self.grad("b_enc"), self._touched, fired, square,
        )  # fmt: skip
        grad_b_dec = self.grad("b_dec").copy_(g_sum)
        if self.config.apply_b_dec_to_input:
            grad_b_dec.sub_(self.grad("b_enc") @ sae.W_enc)
        self._doubtful = rescreened / rows
        self._square_norm = float(square.sum()) + float(grad_b_dec.double().square().sum())
        return Losses(mse, aux, int((h > 0).sum()), fired, rescreened)

    def gradient(self, name: str) -> torch.Tensor:
        grad = self.grad(name)
        return grad.masked_fill(~self._touched[:, None], 0) if grad.ndim == 2 else grad

    def _residual(
        self,
        name: str,
        target_BD: torch.Tensor,
        base_D: torch.Tensor,
        idx_Bk: torch.Tensor,
        h_Bk: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, float]:
        """scale · (base + decoded − target) [B, D], and the mean over tokens of the squared error."""
        rows = len(target_BD)
        g = self.scratch.take(f"{name}.g", *target_BD.shape)
        error = self.scratch.take("error", rows)
        run_kernel(
            kernels.residual, even_split(rows, self.n_threads), target_BD, base_D, self.sae.W_dec, idx_Bk, h_Bk,
            np.float32(scale), g, error,
        )  # fmt: skip
        return g, float(error.sum(dtype=torch.float64)) / rows

    def _sorted(
        self, name: str, idx_Bk: torch.Tensor, h_Bk: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Entries by feature: starts [M + 1], token [E], value [E]."""
        starts = self.scratch.take(f"{name}.starts", self.sae.d_sae + 1, dtype=torch.int32)
        token = self.scratch.take(f"{name}.token", idx_Bk.numel(), dtype=torch.int32)
        value = self.scratch.take(f"{name}.value", idx_Bk.numel())
        kernels.sort_entries(*(array(part) for part in (idx_Bk, h_Bk, starts, token, value)))
        return starts, token, value

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
