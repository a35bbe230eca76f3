"""The sparse step on CPUs: the screening product in torch, everything else in numba kernels.

The screen multiplies int8 copies of x and W_enc · n (one scale a row, exact int32 sums), at half the cost of
bfloat16. Activations with a few enormous coordinates do not survive eight bits; the certificate notices, those rows
are scored in float32, and when they are many the engine screens in bfloat16 for the next HOLD_STEPS steps. Either way
the support is the float32 one.

Shape suffixes as in `topk_kernels`.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from models import topk_kernels as kernels
from models.topk_engines import CERTIFICATE, Backend, Engine, Losses, Scratch, dots, exact_topk, n_candidates
from models.topk_model import SAEConfig, TopKSAE

CHUNK_BYTES_PER_FEATURE = 1024  # of a block of screened scores: 256 rows of int32, 512 of bfloat16
INT8_MARGIN, BFLOAT16_MARGIN = 32, 16  # least surplus of candidates: eight bits err about three times as much
HOLD_STEPS = 256  # steps in bfloat16 after an int8 screen that left more than HOLD_SHARE of its rows in doubt
HOLD_SHARE = 0.02

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def _pool(n_threads: int) -> ThreadPoolExecutor:
    """Pool of this process shared by all engines (a forked child makes its own)."""
    with _pools_lock:
        key = (os.getpid(), n_threads)
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(n_threads, thread_name_prefix="topk")
        return _pools[key]


def _array(value: Any) -> Any:
    """Numpy view of a tensor (bfloat16 as int16 patterns); anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()


def _even_split(size: int, parts: int) -> list[int]:
    return [size * part // parts for part in range(parts + 1)]


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
        self._norm = torch.empty(sae.d_sae)
        self._scale = torch.empty(sae.d_sae)
        self._screen_memory = torch.empty(2 * sae.d_sae * sae.d_in, dtype=torch.uint8)
        self._touched = torch.zeros(sae.d_sae, dtype=torch.bool)
        self._square_norm = 0.0
        self._doubtful = 0.0
        self._hold = 0
        self.refresh()

    @property
    def screen_dtype(self) -> torch.dtype:
        """Precision of the next screen: int8, or bfloat16 while an int8 screen would leave too much in doubt."""
        return torch.bfloat16 if self._hold > 0 else torch.int8

    def _screen_W(self) -> torch.Tensor:
        dtype = self.screen_dtype
        size = self.sae.d_sae * self.sae.d_in * dtype.itemsize
        return self._screen_memory[:size].view(dtype).view(self.sae.d_sae, self.sae.d_in)

    def _run(self, kernel: Callable[..., None], bounds: Sequence[int], *arguments: Any) -> None:
        """kernel(*arguments, start, stop) over consecutive bounds, in the pool when there are several."""
        arrays = [_array(value) for value in arguments]
        spans = [(a, b) for a, b in itertools.pairwise(bounds) if b > a]
        if len(spans) == 1:
            kernel(*arrays, *spans[0])
            return
        for future in [_pool(self.n_threads).submit(kernel, *arrays, a, b) for a, b in spans]:
            future.result()

    def refresh(self) -> None:
        self._norm.copy_(self.sae.decoder_norms())
        self._refresh_screen()

    def _refresh_screen(self) -> None:
        self._lower(self.sae.W_enc, self._norm, self._screen_W(), self._scale)

    def _lower(
        self, rows_ND: torch.Tensor, factor_N: torch.Tensor, low_ND: torch.Tensor, scale_N: torch.Tensor
    ) -> None:
        bounds = _even_split(len(rows_ND), self.n_threads)
        self._run(kernels.write_screen, bounds, rows_ND, factor_N, low_ND, scale_N)

    def derived_state(self) -> dict[str, torch.Tensor]:
        # the kernel sums a norm in another order than torch, so the sum itself is part of the state
        return {"norm": self._norm, "hold": torch.tensor(self._hold)}

    def load_derived_state(self, state: dict[str, torch.Tensor]) -> None:
        self._norm.copy_(state["norm"])
        self._hold = int(state["hold"])
        self._refresh_screen()

    @torch.no_grad()
    def gradients(self, x_BD: torch.Tensor, dead: torch.Tensor | None) -> Losses:
        sae, scratch, rows = self.sae, self.scratch, len(x_BD)
        M, k = sae.d_sae, self.config.k
        xc = x_BD
        if self.config.apply_b_dec_to_input:
            xc = torch.sub(x_BD, sae.b_dec, out=scratch.take("xc", rows, sae.d_in))
        k_aux, weight = (0, 0.0) if dead is None else self.aux_plan(dead)
        screens = self._screen(xc, dead, k_aux)
        idx, h, rescreened = self._select(xc, screens[0], k, "main", None)
        g, mse = self._residual("main", x_BD, sae.b_dec, idx, h, 2 / rows)
        starts, token, value = self._sorted("main", idx, h)
        g_sum = g.sum(0)
        empty_f, empty_i = torch.empty(0), torch.empty(0, dtype=torch.int32)
        aux, aux_parts = 0.0, (torch.empty(0, sae.d_in), empty_i, empty_i, empty_f)
        if dead is not None:
            live = torch.ones(M, dtype=torch.bool)
            live[dead] = False
            aux_idx, aux_h, again = self._select(xc, screens[1], k_aux, "aux", live.nonzero().flatten())
            rescreened += again
            target = torch.mul(g, -rows / 2, out=scratch.take("aux.target", rows, sae.d_in))
            zero = torch.zeros(sae.d_in)
            g_aux, aux = self._residual("aux", target, zero, aux_idx, aux_h, 2 * weight / rows)
            aux *= weight
            aux_parts = (g_aux, *self._sorted("aux", aux_idx, aux_h))
        fired = torch.empty(M, dtype=torch.bool)
        square = scratch.take("square", M, dtype=torch.float64)
        load = starts + aux_parts[1] if dead is not None else starts
        bounds = np.searchsorted(load.numpy(), _even_split(int(load[-1]), self.n_threads)).tolist()
        bounds[0], bounds[-1] = 0, M
        self._run(
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

    def _screen(
        self, xc_BD: torch.Tensor, dead: torch.Tensor | None, k_aux: int
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Candidates [B, K], their screened scores, and the bound [B] on the rest: of all, then of dead features."""
        sae, scratch, rows = self.sae, self.scratch, len(xc_BD)
        bias = torch.mul(sae.b_enc, self._norm, out=scratch.take("screen.bias", sae.d_sae))
        wanted = [("main", self.config.k, sae.d_sae, bias)]
        if dead is not None:
            dead_bias = scratch.take("aux.bias", sae.d_sae).fill_(-torch.inf)
            dead_bias[dead] = bias[dead]
            wanted.append(("aux", k_aux, len(dead), dead_bias))
        W, dtype = self._screen_W(), self.screen_dtype
        product_dtype = torch.int32 if dtype == torch.int8 else dtype
        found = []
        for name, k, features, _ in wanted:
            K = n_candidates(k, features, INT8_MARGIN if dtype == torch.int8 else BFLOAT16_MARGIN)
            cand = scratch.take(f"{name}.cand", rows, K, dtype=torch.int32)
            found.append((cand, scratch.take(f"{name}.screened", rows, K), scratch.take(f"{name}.floor", rows)))
        x = scratch.take("screen.x", rows, sae.d_in, dtype=dtype)
        x_scale = scratch.take("screen.x_scale", rows)
        self._lower(xc_BD, torch.ones(rows), x, x_scale)
        step = CHUNK_BYTES_PER_FEATURE // product_dtype.itemsize
        for start in range(0, rows, step):
            chunk = slice(start, min(start + step, rows))
            size = chunk.stop - chunk.start
            product = scratch.take("screen.product", size, sae.d_sae, dtype=product_dtype)
            if dtype == torch.int8:
                torch._int_mm(x[chunk], W.T, out=product)
            else:
                torch.mm(x[chunk], W.T, out=product)
            for (cand, screened, floor), (_, _, _, offset) in zip(found, wanted, strict=True):
                self._run(
                    kernels.screen, _even_split(size, self.n_threads), product, x_scale[chunk], self._scale, offset,
                    kernels.group_size(sae.d_sae, cand.shape[1]), cand[chunk], screened[chunk], floor[chunk],
                )  # fmt: skip
        for (cand, _, floor), (_, _, features, _) in zip(found, wanted, strict=True):
            if cand.shape[1] == features:
                floor.fill_(-torch.inf)
        return found

    def _select(
        self,
        xc_BD: torch.Tensor,
        screen: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        k: int,
        name: str,
        live: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Support [B, k] (int32), h [B, k], and how many rows were scored in full."""
        sae, scratch, rows = self.sae, self.scratch, len(xc_BD)
        cand, screened, floor = screen
        idx = scratch.take(f"{name}.idx", rows, k, dtype=torch.int32)
        h = scratch.take(f"{name}.h", rows, k)
        close = scratch.take(f"{name}.close", rows, dtype=torch.bool)
        relu = live is None
        self._run(
            kernels.rescore, _even_split(rows, self.n_threads), xc_BD, sae.W_enc, sae.b_enc, self._norm,
            cand, screened, floor, np.float32(CERTIFICATE), relu, idx, h, close,
        )  # fmt: skip
        again = close.nonzero().flatten()
        if len(again):
            exact = exact_topk(sae, xc_BD[again], self._norm, k, live)
            a = dots(xc_BD[again], sae.W_enc, exact).add_(sae.b_enc[exact])
            idx[again] = exact.to(torch.int32)
            h[again] = a.relu_() if relu else a
        return idx, h, len(again)

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
        self._run(
            kernels.residual, _even_split(rows, self.n_threads), target_BD, base_D, self.sae.W_dec, idx_Bk, h_Bk,
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
        kernels.sort_entries(*(_array(part) for part in (idx_Bk, h_Bk, starts, token, value)))
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
        if self.screen_dtype == torch.int8 and self._doubtful > HOLD_SHARE:
            self._hold = HOLD_STEPS
        else:
            self._hold = max(0, self._hold - 1)
        parts = [
            value
            for name in ("W_enc", "W_dec")
            for value in (getattr(sae, name), self.exp_avg[name], self.exp_avg_sq[name], self.grad(name))
        ]
        self._run(
            kernels.adam_features, _even_split(sae.d_sae, self.n_threads), *parts, self._touched,
            config.rescale_acts_by_decoder_norm, self._norm, self._screen_W(), self._scale, *numbers,
        )  # fmt: skip
        for name in ("b_enc", "b_dec"):
            vectors = (getattr(sae, name), self.exp_avg[name], self.exp_avg_sq[name], self.grad(name))
            kernels.adam_vector(*(_array(vector) for vector in vectors), *numbers)
