"""What the codec sweep hands to its report: everything measured, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd


@dataclass(frozen=True)
class Results:
    """Everything measured, with at least one row per cell (architecture, lr, seed).

    models: architecture, lr, seed, cell_key, n_parameters, flops_per_token, tokens_per_second, train_tokens,
        unigram_nll, and for W in raw and ema: val_nll_W, val_loss_smoothed_W, perplexity_W, bits_per_second_W.
    curves: architecture, lr, seed, metric, weights, group, step, value.
    codebooks: architecture, lr, seed, weights, codebook, nll, top1, top5.
    clips: architecture, lr, seed, weights, clip_id, recording_id, nll (sum), tokens.
    spikes: architecture, lr, seed, group, value (steps whose gradient norm jumped).
    gates: architecture, lr, seed, weights, clip_id, recording_id, layer, steps and the numbers of
        models.codec.cache_health; may be empty.
    audio: embedder, architecture, clips, vectors, frechet, frechet_limit with frechet_lo and _hi, kernel, and
        coherence with _lo and _hi;
        the rows REAL are training audio against held-out audio; may be empty.
    samples: architecture, and the name of a spectrogram in the report's folder.
    texts: of models with text conditioning, the rows of clips with the averaged weights and other texts too, told apart
        by text (right, shuffled, no_text); may be empty.
    """

    models: pd.DataFrame
    curves: pd.DataFrame
    codebooks: pd.DataFrame
    clips: pd.DataFrame
    spikes: pd.DataFrame
    gates: pd.DataFrame
    audio: pd.DataFrame
    samples: Sequence[tuple[str, str]]
    texts: pd.DataFrame = field(default_factory=pd.DataFrame)


def at(frame: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """Rows of a frame (columns architecture, lr) at each architecture's chosen learning rate."""
    return frame.merge(chosen[["architecture", "lr"]], on=["architecture", "lr"])
