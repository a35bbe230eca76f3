"""The k·B largest activations of a batch, on CPUs: a low-precision product leaves out what cannot be among them.

Shape suffixes: B tokens, D = d_in, M = d_sae, C candidates, E kept entries, Cb blocks of columns (`kernels`).

A guess of the smallest kept score is 95% of the last batch's. The screen (`screen.Screen`) keeps every feature whose
score may reach it: the low-precision score plus the largest error that its rounding can have made. These candidates
are scored in float32, and if k·B of them reach the guess, the k·B largest are those of the whole batch. If fewer do,
the guess is lowered and the batch screened again; if the rounding leaves too many candidates, the product is done in
float32. So the guess and the precision decide the time, never the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from models.cpu.threads import array, even_split, run_kernel
from models.sae import batch_kernels as kernels
from models.sae.model import row_chunks
from models.sae.screen import Screen

KEPT_GUESS = 0.95  # of the last batch's smallest kept score: a batch differs from the next by less
SAMPLE_ROWS, SAMPLE_SURPLUS = 64, 1.25  # rows that a first guess looks at; times k features per row it aims to keep
MOST_CANDIDATES, MOST_PER_ROW = 6, 32  # times k·B, plus so many per row: more in low precision, and float32 is cheaper
# of the lengths' product: what sums in float32, and a product that is stored in bfloat16, are off by themselves
ROUNDING = {torch.int8: 2.0**-16, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-16}


@dataclass(frozen=True)
class Sorted:
    """Kept entries by feature (feature j owns starts[j]:starts[j + 1], its tokens ascending) and their h."""

    starts_M1: torch.Tensor
    token_E: torch.Tensor
    value_E: torch.Tensor


class BatchScreen:
    """Finds the k·B largest positive a·n of a batch with the low-precision weights of `screen`.

    `guess` is the smallest score that the next batch is expected to keep (NaN: not known), `doubtful` 1.0 after a
    batch that the low precision could not settle.
    """

    def __init__(self, screen: Screen) -> None:
        self.screen, self.sae = screen, screen.sae
        self.guess = math.nan
        self.doubtful = 0.0

    def largest(self, xc_BD: torch.Tensor, xc_CBb: torch.Tensor) -> tuple[Sorted, float, int]:
        """The entries, the smallest kept score (NaN where nothing is positive), and the rows scored in float32.

        Of equal scores at the edge, those of earlier features are kept, then those of earlier tokens.
        """
        wanted = self.sae.k * len(xc_BD)
        surplus, exact = SAMPLE_SURPLUS, False
        least = self._sampled(xc_BD, surplus) if math.isnan(self.guess) else self.guess
        while True:
            found = self._reaching(xc_BD, least, exact)
            if found is None:
                exact, least = True, max(least, self._sampled(xc_BD, surplus))
                continue
            starts, token = found
            a, score = self._scored(xc_CBb, starts, token)
            edge = float(np.partition(score, len(score) - wanted)[len(score) - wanted]) if len(score) >= wanted else 0.0
            if least <= 0 or edge >= least:
                break
            surplus *= 2
            least = 0.9 * min(least, self._sampled(xc_BD, surplus)) if surplus < 64 else 0.0
        self.doubtful = float(exact)
        self.guess = KEPT_GUESS * max(edge, 0.0)
        kept = _largest(score, edge, wanted)
        value = a[kept]
        ends = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])[starts.numpy()].astype(np.int32)
        entries = Sorted(torch.from_numpy(ends), torch.from_numpy(token.numpy()[kept]), torch.from_numpy(value))
        return entries, float(score[kept].min()) if len(value) else math.nan, len(xc_BD) if exact else 0

    def _sampled(self, xc_BD: torch.Tensor, surplus: float) -> float:
        """A score that about surplus · k features per token exceed, from rows at even distances; at least zero."""
        rows = xc_BD[:: max(1, len(xc_BD) // SAMPLE_ROWS)][:SAMPLE_ROWS]
        scores = torch.addmm(self.sae.b_enc, rows, self.sae.W_enc.T).mul_(self.screen.norm_M).flatten()
        count = math.ceil(surplus * self.sae.k * len(rows))
        return 0.0 if count >= len(scores) else max(0.0, float(scores.topk(count, sorted=False).values.min()))

    def _reaching(self, xc_BD: torch.Tensor, least: float, exact: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Candidates by feature (starts, tokens); None where the low precision leaves too many of them."""
        sae, screen, rows = self.sae, self.screen, len(xc_BD)
        low_x, scale_x = (xc_BD, torch.ones(rows)) if exact else screen.lowered(xc_BD)
        length_x, miss_x = self._errors(xc_BD, torch.ones(rows), low_x, scale_x)
        low_W, scale_W = (sae.W_enc, screen.norm_M) if exact else (screen.low_MD(), screen.scale_M)
        length_W, miss_W = self._errors(sae.W_enc, screen.norm_M, low_W, scale_W)
        miss_x += ROUNDING[low_x.dtype] * (length_x + miss_x)
        counts, parts, total = torch.empty(rows, dtype=torch.int64), [], 0
        limit = math.inf if low_x.dtype == torch.float32 else MOST_CANDIDATES * sae.k * rows + MOST_PER_ROW * rows
        bias = screen.bias()
        for chunk, product in self._exact_products(xc_BD) if exact else screen.products(low_x):
            split = even_split(len(product), screen.n_threads)
            marked = screen.scratch.take("batch.marked", *product.shape, dtype=torch.bool)
            run_kernel(
                kernels.mark, split, product, scale_x[chunk], scale_W, bias, length_W, miss_W, miss_x[chunk],
                length_x[chunk], np.float32(least), marked, counts[chunk],
            )  # fmt: skip
            first = torch.zeros(len(product) + 1, dtype=torch.int64)
            torch.cumsum(counts[chunk], 0, out=first[1:])
            total += int(first[-1])
            if total > limit:
                return None
            index = torch.empty(int(first[-1]), dtype=torch.int32)
            run_kernel(kernels.collect, split, marked, first, index)
            parts.append(index)
        first = torch.zeros(rows + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=first[1:])
        starts, token = torch.empty(sae.d_sae + 1, dtype=torch.int32), torch.empty(total, dtype=torch.int32)
        kernels.sort_ragged(*(array(part) for part in (torch.cat(parts), first, starts, token)))
        return starts, token

    def _exact_products(self, xc_BD: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """x · W_enc in float32, a block of rows at a time."""
        for chunk in row_chunks(len(xc_BD), 4 * self.sae.d_sae):
            yield chunk, xc_BD[chunk] @ self.sae.W_enc.T

    def _errors(
        self, rows_ND: torch.Tensor, factor_N: torch.Tensor, low_ND: torch.Tensor, scale_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths [N] of what the low precision keeps of each row, and of what it loses."""
        length, miss = torch.empty(len(rows_ND)), torch.empty(len(rows_ND))
        run_kernel(
            kernels.screen_error, even_split(len(rows_ND), self.screen.n_threads), rows_ND, factor_N, low_ND, scale_N,
            length, miss,
        )  # fmt: skip
        return length, miss

    def _scored(
        self, xc_CBb: torch.Tensor, starts_M1: torch.Tensor, token_C: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """a and a · n of the candidates in float32."""
        screen = self.screen
        a = screen.dots(xc_CBb, self.sae.W_enc, starts_M1, token_C, "batch.a")
        score = screen.scratch.take("batch.score", len(a))
        split = even_split(self.sae.d_sae, screen.n_threads)
        run_kernel(kernels.score_entries, split, starts_M1, self.sae.b_enc, screen.norm_M, a, score)
        return a.numpy(), score.numpy()


def _largest(score_C: np.ndarray, edge: float, wanted: int) -> np.ndarray:
    """Which scores are among the `wanted` largest positive ones; `edge` is the smallest of these, or at most zero."""
    kept = score_C > max(edge, 0.0)
    if edge > 0:
        equal = np.flatnonzero(score_C == np.float32(edge))
        kept[equal[: wanted - int(kept.sum())]] = True
    return kept
