"""Which features are active, on CPUs: a low-precision product finds candidates, float32 settles them.

The screen multiplies copies of x and W_enc · n in the precision that is measured to be the fastest here (`precision`):
int8 (one scale a row, exact int32 sums, by torch or by `models.cpu.int8`), bfloat16, or float32 where neither is
faster. Activations with a few enormous coordinates do not survive eight bits; the certificate notices, those rows are
scored in float32, and when they are many the screen turns to bfloat16 for the next HOLD_STEPS batches, or to float32
where bfloat16 is no faster. Either way the support is the float32 one.

Shape suffixes as in `kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from models.cpu import int8
from models.cpu.threads import array, even_split, run_kernel
from models.sae import kernels
from models.sae.engines import CERTIFICATE, Scratch, dots, exact_topk, n_candidates
from models.sae.intrinsics import BLOCK
from models.sae.jumprelu import JumpReLUSAE
from models.sae.model import TopKSAE
from models.sae.precision import bfloat16_is_faster, multiplies_pairs, screen_precision

CHUNK_BYTES_PER_FEATURE = 1024  # of a block of screened scores; 256 rows of int32, 512 of bfloat16
INT8_MARGIN, BFLOAT16_MARGIN = 32, 16  # least surplus of candidates: int8's error is about three times as large
HOLD_STEPS = (
    256  # batches in another precision after an int8 screen that left more than HOLD_SHARE of its rows in doubt
)
HOLD_SHARE = 0.02


def multiplies_int8() -> bool:
    """Whether this CPU has instructions for the int8 product: what a plan counts with, which measures nothing."""
    return bool(torch.cpu._is_vnni_supported())


def feature_split(starts_M1: torch.Tensor, parts: int, low: int = 0, high: int | None = None) -> list[int]:
    """Bounds of `parts` consecutive ranges of the features low:high with about equally many sorted entries each."""
    high = len(starts_M1) - 1 if high is None else high
    starts = starts_M1[low : high + 1].numpy()
    first = int(starts[0])
    wanted = [first + share for share in even_split(int(starts[-1]) - first, parts)]
    bounds = [low + int(place) for place in np.searchsorted(starts, wanted)]
    bounds[0], bounds[-1] = low, high
    return bounds


def blocks_of(rows_ND: torch.Tensor, scratch: Scratch, name: str, n_threads: int = 1) -> torch.Tensor:
    """The rows in blocks of columns, [C, N, BLOCK] (see `kernels.write_blocks`), in the scratch buffer `name`."""
    rows, width = rows_ND.shape
    blocks = scratch.take(name, -(-width // BLOCK), rows, BLOCK)
    run_kernel(kernels.write_blocks, even_split(rows, n_threads), rows_ND, blocks)
    return blocks


@dataclass(frozen=True)
class Candidates:
    """What a screen leaves: K features per token, their screened scores, and a bound on the score of all others."""

    index_BK: torch.Tensor
    screened_BK: torch.Tensor
    floor_B: torch.Tensor


class Screen:
    """Finds the exact top k of one SAE; keeps the weights that it needs in low precision.

    `norm_M`, `scale_M` and `low_MD()` follow the weights: `refresh` recomputes them, and the Adam kernel, which has
    each row in cache anyway, writes them as it goes.
    """

    def __init__(self, sae: TopKSAE, scratch: Scratch, n_threads: int) -> None:
        self.sae, self.scratch, self.n_threads = sae, scratch, n_threads
        self.norm_M = torch.empty(sae.d_sae)
        self.scale_M = torch.empty(sae.d_sae)
        self.first = screen_precision()
        self.second = self.first
        if self.first == torch.int8:
            self.second = torch.bfloat16 if bfloat16_is_faster() else torch.float32
        self._pairs = self.first == torch.int8 and multiplies_pairs()
        self._memory = torch.empty(self.second.itemsize * sae.d_sae * sae.d_in, dtype=torch.uint8)
        self.hold = 0
        self.refresh()

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the next screen: the fastest here, or the second while int8 would leave too much in doubt."""
        return self.second if self.hold > 0 else self.first

    def low_MD(self) -> torch.Tensor:
        """W_enc · n in the precision of the next screen."""
        size = self.sae.d_sae * self.sae.d_in * self.dtype.itemsize
        return self._memory[:size].view(self.dtype).view(self.sae.d_sae, self.sae.d_in)

    def refresh(self) -> None:
        """Recompute norms and low-precision weights."""
        self.norm_M.copy_(self.sae.decoder_norms())
        self.refresh_weights()

    def refresh_weights(self) -> None:
        """Recompute the low-precision weights from the current `norm_M`."""
        self._lower(self.sae.W_enc, self.norm_M, self.low_MD(), self.scale_M)

    def judge(self, doubtful: float) -> None:
        """Choose the next precision, given the share of rows that the last screen left in doubt."""
        if self.dtype == torch.int8 and doubtful > HOLD_SHARE:
            self.hold = HOLD_STEPS
        else:
            self.hold = max(0, self.hold - 1)

    def _lower(
        self, rows_ND: torch.Tensor, factor_N: torch.Tensor, low_ND: torch.Tensor, scale_N: torch.Tensor
    ) -> None:
        run_kernel(kernels.write_screen, even_split(len(rows_ND), self.n_threads), rows_ND, factor_N, low_ND, scale_N)

    def candidates(self, xc_BD: torch.Tensor, dead: torch.Tensor | None, k_aux: int) -> list[Candidates]:
        """Candidates among all features for the SAE's k, then (with `dead`) among the dead ones for k_aux."""
        bias = self.bias()
        wanted = [("main", self.sae.k, self.sae.d_sae, bias)]
        return self._screened(xc_BD, wanted if dead is None else [*wanted, self._dead(dead, k_aux, bias)])

    def dead_candidates(self, xc_BD: torch.Tensor, dead: torch.Tensor, k_aux: int) -> Candidates:
        """Candidates among the dead features for k_aux."""
        return self._screened(xc_BD, [self._dead(dead, k_aux, self.bias())])[0]

    def bias(self) -> torch.Tensor:
        """b_enc · n [M]."""
        return torch.mul(self.sae.b_enc, self.norm_M, out=self.scratch.take("screen.bias", self.sae.d_sae))

    def _dead(self, dead: torch.Tensor, k_aux: int, bias_M: torch.Tensor) -> tuple[str, int, int, torch.Tensor]:
        dead_bias = self.scratch.take("aux.bias", self.sae.d_sae).fill_(-torch.inf)
        dead_bias[dead] = bias_M[dead]
        return "aux", k_aux, len(dead), dead_bias

    def _screened(self, xc_BD: torch.Tensor, wanted: Sequence[tuple[str, int, int, torch.Tensor]]) -> list[Candidates]:
        """Candidates for each (name, k, features that count, bias with −∞ for all others)."""
        sae, scratch, rows, dtype = self.sae, self.scratch, len(xc_BD), self.dtype
        found = []
        for name, k, features, _ in wanted:
            K = n_candidates(k, features, INT8_MARGIN if dtype == torch.int8 else BFLOAT16_MARGIN)
            index = scratch.take(f"{name}.cand", rows, K, dtype=torch.int32)
            screened = scratch.take(f"{name}.screened", rows, K)
            found.append(Candidates(index, screened, scratch.take(f"{name}.floor", rows)))
        x, x_scale = self.lowered(xc_BD)
        for chunk, product in self.products(x):
            for part, (_, _, _, offset) in zip(found, wanted, strict=True):
                run_kernel(
                    kernels.screen, even_split(len(product), self.n_threads), product, x_scale[chunk], self.scale_M,
                    offset, kernels.group_size(sae.d_sae, part.index_BK.shape[1]),
                    part.index_BK[chunk], part.screened_BK[chunk], part.floor_B[chunk],
                )  # fmt: skip
        for part, (_, _, features, _) in zip(found, wanted, strict=True):
            if part.index_BK.shape[1] == features:
                part.floor_B.fill_(-torch.inf)
        return found

    def lowered(self, xc_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows in the precision of the next screen, and their scales [B]."""
        x = self.scratch.take("screen.x", *xc_BD.shape, dtype=self.dtype)
        x_scale = self.scratch.take("screen.x_scale", len(xc_BD))
        self._lower(xc_BD, torch.ones(len(xc_BD)), x, x_scale)
        return x, x_scale

    def products(self, x_BD: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """The screening product of lowered rows with the lowered weights, a block of rows at a time."""
        W, multiply = self._weights()
        dtype = torch.int32 if self.dtype == torch.int8 else self.dtype
        step = CHUNK_BYTES_PER_FEATURE // dtype.itemsize
        for start in range(0, len(x_BD), step):
            chunk = slice(start, min(start + step, len(x_BD)))
            product = self.scratch.take("screen.product", chunk.stop - chunk.start, self.sae.d_sae, dtype=dtype)
            multiply(x_BD[chunk], W, product)
            yield chunk, product

    def _weights(self) -> tuple[torch.Tensor, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]]:
        """The lowered weights as the product takes them, and the product (x, weights, result)."""
        low = self.low_MD()
        if self.dtype != torch.int8:
            return low.T, lambda x, W, out: torch.mm(x, W, out=out)
        if not self._pairs:
            return low.T, lambda x, W, out: torch._int_mm(x, W, out=out)
        panels = self.scratch.take("screen.panels", *int8.packed_shape(*low.shape), dtype=torch.int16)
        return int8.pack(low, panels, self.n_threads), partial(int8.multiply, n_threads=self.n_threads)

    def sort(self, idx_Bk: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Entries by feature: starts [M + 1], token [E], and the slot of each entry [B, k]."""
        starts = self.scratch.take(f"{name}.starts", self.sae.d_sae + 1, dtype=torch.int32)
        token = self.scratch.take(f"{name}.token", idx_Bk.numel(), dtype=torch.int32)
        slot = self.scratch.take("sort.slot", *idx_Bk.shape, dtype=torch.int32)
        kernels.sort_entries(*(array(part) for part in (idx_Bk, starts, token, slot)))
        return starts, token, slot

    def dots(
        self, rows_CBb: torch.Tensor, W_MD: torch.Tensor, starts_M1: torch.Tensor, token_E: torch.Tensor, name: str
    ) -> torch.Tensor:
        """W[j] · rows[token] of each sorted entry [E]."""
        dot = self.scratch.take(name, len(token_E))
        bounds = feature_split(starts_M1, self.n_threads)
        span = kernels.block_span(len(token_E), self.sae.d_sae)
        run_kernel(kernels.feature_dots, bounds, rows_CBb, W_MD, starts_M1, token_E, dot, span)
        return dot

    def select(
        self,
        xc_BD: torch.Tensor,
        xc_CBb: torch.Tensor,
        found: Candidates,
        k: int,
        name: str,
        live_M: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Support [B, k] (int32), a [B, k] and how many rows were scored in full. xc_CBb: `blocks_of` xc_BD.

        a passes relu unless the features that `live_M` marks are left out."""
        sae, scratch, rows = self.sae, self.scratch, len(xc_BD)
        idx = scratch.take(f"{name}.idx", rows, k, dtype=torch.int32)
        h = scratch.take(f"{name}.h", rows, k)
        close = scratch.take(f"{name}.close", rows, dtype=torch.bool)
        relu = live_M is None
        starts, token, slot = self.sort(found.index_BK, "sort")
        a = self.dots(xc_CBb, sae.W_enc, starts, token, "sort.dot")
        run_kernel(
            kernels.rescore, even_split(rows, self.n_threads), a, slot, sae.b_enc, self.norm_M,
            found.index_BK, found.screened_BK, found.floor_B, np.float32(CERTIFICATE), relu, idx, h, close,
        )  # fmt: skip
        again = close.nonzero().flatten()
        if len(again):
            exact = exact_topk(sae, xc_BD[again], self.norm_M, k, live_M)
            a_again = dots(xc_BD[again], sae.W_enc, exact).add_(sae.b_enc[exact])
            idx[again] = exact.to(torch.int32)
            h[again] = a_again.relu_() if relu else a_again
        return idx, h, len(again)


class ScreenedEncoder:
    """`TopKSAE.encode` of a finished SAE by its screen: the same support, at a fraction of the full product.

    Weights are read when the object is made. `rows` is the largest number of tokens screened at once.
    """

    def __init__(self, sae: TopKSAE, *, n_threads: int | None = None, rows: int = 4096) -> None:
        self.sae, self.rows = sae, rows
        self._screen = Screen(sae, Scratch(), n_threads or torch.get_num_threads())

    @torch.no_grad()
    def __call__(self, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., d_in] -> feature indices (int64) and activations relu(a n), both [..., k], in no particular order.

        Raises ValueError on a wrong width and on activations that are NaN or infinite.
        """
        self.sae.check_width(x_BD)
        bad = int((~torch.isfinite(x_BD)).sum())
        if bad:
            raise ValueError(f"{bad} of {x_BD.numel()} activations are NaN or inf; drop those tokens before encoding")
        flat_BD = x_BD.reshape(-1, self.sae.d_in).to(self.sae.W_enc.dtype)
        parts = [self._encode(part) for part in flat_BD.split(self.rows)]
        shape = (*x_BD.shape[:-1], self.sae.k)
        index, value = (torch.cat(part).view(shape) for part in zip(*parts, strict=True))
        return index, value

    def _encode(self, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        xc = self.sae.centred(x_BD).contiguous()
        (found,) = self._screen.candidates(xc, None, 0)
        xc_CBb = blocks_of(xc, self._screen.scratch, "xc.blocks")
        idx, a, again = self._screen.select(xc, xc_CBb, found, self.sae.k, "main", None)
        if again > HOLD_SHARE * len(xc) and self._screen.dtype == torch.int8:
            self._screen.judge(again / len(xc))
            self._screen.refresh_weights()
        idx = idx.long()
        return idx, a * self._screen.norm_M[idx]


def encoder(sae: TopKSAE | JumpReLUSAE) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The cheapest exact encoder of a finished SAE here: screened for TopK on CPUs that multiply a low precision
    faster, else `sae.encode`. All have the signature of `TopKSAE.encode`."""
    if isinstance(sae, TopKSAE) and sae.W_enc.device.type == "cpu" and screen_precision() != torch.float32:
        return ScreenedEncoder(sae)
    return sae.encode
