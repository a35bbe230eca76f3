"""Held-out clips one by one: their likelihood, and how each layer with memory caching uses its caches on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
import torch

from analysis.codec.scores import CodebookScores
from data.audio_io import recording_of
from data.token_batches import TokenClips, evaluation_batches
from models.codec.cache_health import GateSums
from models.codec.delay import training_pair
from models.codec.model import CodecLM
from sweeps.codec.loop import autocast
from sweeps.codec.texts import RIGHT, given_texts
from sweeps.ledger.published import parquet_bytes

LAYER = "layer"
EVAL_BATCH = 8  # held-out clips scored at once; it decides their order too
_FACTS = ("cache_mass", "effective_mass", "entropy", "entropy_share", "read_ratio", "openness", "gate_bias")


def clip_table(
    scores: Mapping[str, CodebookScores],
    clips: TokenClips,
    n_clips: int,
    other_texts: Mapping[str, CodebookScores] | None = None,
) -> bytes:
    """Parquet with a row for each held-out clip and kind of weights.

    Columns: weights, clip_id, recording_id (of the recording it was cut from), nll (a sum, nats), tokens.
    other_texts: scores of the averaged weights with other texts than the clips' own, by kind; with some, a column
    `text` names the kind, `right` for `scores`.
    """
    batches = evaluation_batches(clips, EVAL_BATCH, max_frames=1, n_clips=n_clips)
    ids = [name for batch in batches for name in batch.clip_ids]
    recordings = dict(zip(clips.clip_ids, clips.recording_ids, strict=True))
    who = {"clip_id": ids, "recording_id": [recordings[name] for name in ids]}
    tables = [some.clips().assign(weights=weights, **who) for weights, some in scores.items()]
    if other_texts:
        tables = [some.assign(text=RIGHT) for some in tables]
        for kind, some in other_texts.items():
            tables.append(some.clips().assign(weights="ema", **who, text=kind))
    return parquet_bytes(pd.concat(tables, ignore_index=True))


def with_recordings(clips: pd.DataFrame) -> pd.DataFrame:
    """A published table by clip with the column `recording_id`, which older ledgers do not have.

    Clips of one `recording_id` are one unit of resampling: they share their room, voice and text.
    """
    if "recording_id" in clips:
        return clips
    return clips.assign(recording_id=clips["clip_id"].map(recording_of))


def gate_table(models: Mapping[str, CodecLM], clips: TokenClips, n_clips: int, precision: str) -> bytes:
    """Parquet with a row per kind of weights, held-out clip and layer with caches; see models.codec.cache_health."""
    records: list[dict[str, Any]] = []
    recordings = dict(zip(clips.clip_ids, clips.recording_ids, strict=True))
    for weights, model in models.items():
        for ids, layers in _walk(model, clips, n_clips, precision):
            for sums in layers:
                for name, steps, health in zip(ids, sums.steps.tolist(), sums.clips(), strict=True):
                    who = {"weights": weights, "clip_id": name, "recording_id": recordings[name]}
                    facts = who | {"layer": health.layer, "steps": steps}
                    records.append(facts | {f: getattr(health, f) for f in _FACTS})
    return parquet_bytes(pd.DataFrame(records))


def gate_numbers(model: CodecLM, clips: TokenClips, n_clips: int, precision: str) -> dict[str, float]:
    """Means over held-out clips by `metric/layerN`, for the curves over training; empty without memory caching."""
    found: dict[int, list[GateSums]] = {}
    if model.config.memory_cache is None:
        return {}
    for _, layers in _walk(model, clips, n_clips, precision):
        for sums in layers:
            found.setdefault(sums.layer, []).append(sums)
    pooled = {layer: GateSums.pool(parts).health() for layer, parts in found.items()}
    return {f"gate_{f}/{LAYER}{layer}": getattr(health, f) for layer, health in pooled.items() for f in _FACTS}


def _walk(
    model: CodecLM, clips: TokenClips, n_clips: int, precision: str
) -> Iterator[tuple[tuple[str, ...], list[GateSums]]]:
    """(clip ids, statistics of each layer) of the batches that `evaluate` sees."""
    config, device = model.config, model.heads.device
    model.eval()
    with torch.inference_mode(), autocast(device, precision):
        for batch in evaluation_batches(clips, EVAL_BATCH, max_frames=config.max_frames, n_clips=n_clips):
            inputs, _ = training_pair(batch.codes_BKT, pad=config.pad, bos=config.bos)
            texts = given_texts(config, batch.texts, device)
            length_B = batch.length_B + config.n_codebooks - 1
            yield batch.clip_ids, model.gate_sums(inputs.to(device), length_B, texts)
