"""Scores of a model on held-out clips, and the unigram model that they are compared with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from analysis.codec.scores import CodebookScores
from data.token_batches import evaluation_batches
from models.codec.delay import training_pair
from models.codec.loss import codebook_loss
from models.codec.model import CodecLM
from sweeps.codec.clip_tables import EVAL_BATCH
from sweeps.codec.loop import autocast
from sweeps.codec.texts import given_texts
from sweeps.core.cells import Row
from sweeps.core.world import World

if TYPE_CHECKING:
    from data.token_batches import TokenClips


def unigram_nll(train: TokenClips, held: TokenClips) -> float:
    """Nats per token of held-out codes under each codebook's training frequencies (add-one): what an LM must beat."""
    size = train.special.codebook_size
    counts_KV = np.ones((train.n_codebooks, size))
    offsets = np.arange(train.n_codebooks)[:, None] * size
    for clip in range(len(train)):
        codes = train.codes(clip).astype(np.int64)
        counts_KV += np.bincount((codes + offsets).ravel(), minlength=counts_KV.size).reshape(counts_KV.shape)
    log_p = np.log(counts_KV / counts_KV.sum(1, keepdims=True)).ravel()
    parts = [log_p[(held.codes(c).astype(np.int64) + offsets).ravel()] for c in range(len(held))]
    return float(-np.concatenate(parts).mean())


WEIGHTS = ("raw", "ema")
ALONE = World()


def evaluate(model: CodecLM, clips: TokenClips, n_clips: int, precision: str, world: World = ALONE) -> CodebookScores:
    """Scores on held-out clips, kept by clip with its recording for the intervals; the processes share the batches."""
    config, device = model.config, model.heads.device
    recordings = dict(zip(clips.clip_ids, clips.recording_ids, strict=True))
    found: dict[int, list[tuple[str, dict[str, npt.NDArray[np.float64]]]]] = {}
    model.eval()
    with torch.inference_mode(), autocast(device, precision):
        for batch in evaluation_batches(clips, EVAL_BATCH, max_frames=config.max_frames, n_clips=n_clips):
            if batch.index % world.size != world.rank:
                continue
            inputs, targets = training_pair(batch.codes_BKT, pad=config.pad, bos=config.bos)
            texts = given_texts(config, batch.texts, device)
            hidden = model.decode_embedded(model.embed(inputs.to(device)), texts)
            for clip_id, h_TD, target_KT in zip(batch.clip_ids, hidden, targets.to(device), strict=True):
                r = codebook_loss(h_TD[None], model.heads, target_KT[None], pad=config.pad, accuracy=True)
                sums = {"nll": r.nll_K, "uniform": r.uniform_K, "count": r.count_K, "top1": r.top1_K, "top5": r.top5_K}
                some = {name: values[None].cpu().numpy() for name, values in sums.items() if values is not None}
                found.setdefault(batch.index, []).append((recordings[clip_id], some))
    whole: dict[int, list[tuple[str, dict[str, npt.NDArray[np.float64]]]]] = {}
    for part in world.gather(found):
        whole |= part
    scores = CodebookScores(config.n_codebooks)
    for index in sorted(whole):
        for recording, some in whole[index]:
            scores.add(some, [recording])
    return scores


def nll_rows(scores: CodebookScores, metric: str, params: dict[str, str]) -> list[Row]:
    interval = scores.val_nll_ci()
    values = {"": scores.val_nll(), "_lo": interval.lo, "_hi": interval.hi}  # no limits for one recording
    return [Row(metric + end, value, "nats a token", params) for end, value in values.items() if math.isfinite(value)]
