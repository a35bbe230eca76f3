"""Tokens that a cell of the proxy gap leaves out of training and evaluation: `drop_positions`, `max_norm_multiple`.

Shape suffixes: S sequences, T tokens of a sequence, N = S·T in shuffled order, D activation width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sweeps.core.cells import UserError

if TYPE_CHECKING:
    from sweeps.sae.cells import SAECell


def leaves_out(cell: SAECell) -> bool:
    """Whether the cell leaves tokens out."""
    return bool(cell.drop_positions or cell.max_norm_multiple)


def kept_tokens(norm_ST: torch.Tensor, cell: SAECell) -> torch.Tensor:
    """bool [S, T]: tokens from position `drop_positions` on whose norm is at most `max_norm_multiple` medians.

    The median is that of all given norms: one shuffle block's in training, the held-out text's in the evaluation.
    Raises UserError where no token is left.
    """
    kept_ST = (torch.arange(norm_ST.shape[1], device=norm_ST.device) >= cell.drop_positions).expand(norm_ST.shape)
    if cell.max_norm_multiple:
        kept_ST = kept_ST & (norm_ST <= cell.max_norm_multiple * norm_ST.flatten().median())
    if not bool(kept_ST.any()):
        raise UserError(
            f"drop_positions={cell.drop_positions} and max_norm_multiple={cell.max_norm_multiple:g} leave no token of "
            f"{norm_ST.numel()}; choose fewer positions or a larger multiple"
        )
    return kept_ST


def replace_dropped(a_ND: torch.Tensor, kept_N: torch.Tensor) -> None:
    """Repeat the first kept tokens in place of dropped ones, so that steps keep their size and number."""
    dropped, kept = torch.where(~kept_N)[0], torch.where(kept_N)[0]
    a_ND[dropped] = a_ND[kept[torch.arange(len(dropped), device=kept.device) % len(kept)]]
