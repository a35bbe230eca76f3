"""Token batches bucketed by length and trimmed to their content: deterministic, and resumable at any batch.

Padding every clip to the context length makes a model of 8 s clips spend 41% of its work on nothing. Here clips of
similar length meet in a batch, and a batch is as wide as its longest clip. The plan of an epoch is a function of
(clip lengths, batch size, seed, epoch) alone: batch i can be made without making those before it.

Shape suffixes: B clips, K codebooks, T frames, C clips of the whole set.
"""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from data.codec_shards import Folder, Tokens, read_facts
from data.split import Side, identity_hash, side_of
from data.token_ids import bad_id

_CACHED_SHARDS = 48  # kept decoded: more than the `window` of 32 that shuffling reads at once


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that follow a codebook of V codes: PAD = V, BOS = V + 1, EOS = V + 2; 1024, 1025, 1026 for V = 1024."""

    codebook_size: int

    @property
    def pad(self) -> int:
        return self.codebook_size

    @property
    def bos(self) -> int:
        return self.codebook_size + 1

    @property
    def vocabulary(self) -> int:
        return self.codebook_size + 3


@dataclass(frozen=True)
class TokenBatch:
    """codes_BKT int64, PAD after each clip's end; length_B in frames; ``index`` of the batch in its epoch.

    ``real_tokens`` of the ``codes_BKT.numel()`` computed are content.
    """

    index: int
    codes_BKT: Tensor
    length_B: Tensor
    clip_ids: tuple[str, ...]
    texts: tuple[str, ...]
    real_tokens: int


class TokenClips:
    """Clips of one side of the split with random access; shards are read when needed and a few of them kept.

    Args:
        tokens: from tokenise or open_tokens.
        side: ``"train"``, ``"validation"`` or None for both.
        holdout: share of recordings in validation, by hash of the recording's id: chunks never straddle the split.
        part: which such share, see `data.split.side_of`.
    Raises:
        ValueError: no clip on that side.
    """

    def __init__(self, tokens: Tokens, side: Side | None = "train", *, holdout: float = 0.05, part: int = 0) -> None:
        manifest = tokens.manifest
        self.special = SpecialTokens(manifest["codec"]["codebook_size"])
        self.n_codebooks: int = manifest["codec"]["n_codebooks"]
        self.frame_rate_hz: float = manifest["codec"]["frame_rate_hz"]
        self._folder = Folder(tokens.folder)
        self._files = [s["file"] for s in manifest["shards"]]
        self._cache: OrderedDict[int, list[npt.NDArray[np.uint16]]] = OrderedDict()
        self.clip_ids: list[str] = []
        self.recording_ids: list[str] = []
        self.texts: list[str] = []
        shard, row, frames, chunks, seconds = [], [], [], [], []
        for s, file in enumerate(self._files):
            _facts, table = read_facts(self._folder, file)
            for r, record in enumerate(table.to_pylist()):
                if side is not None and side_of(record["recording_id"], holdout=holdout, part=part) != side:
                    continue
                self.clip_ids.append(record["clip_id"])
                self.recording_ids.append(record["recording_id"])
                self.texts.append(record["text"])
                shard.append(s)
                row.append(r)
                frames.append(record["n_frames"])
                chunks.append(record["n_chunks"])
                seconds.append(record["duration_s"])
        if not shard:
            raise ValueError(f"no clip of {tokens.folder} is in {side}; {manifest['n_clips']} clips, holdout={holdout}")
        self.shard_C = np.array(shard)
        self._row_C = np.array(row)
        self.n_frames_C = np.array(frames)
        self.n_chunks_C = np.array(chunks)  # of the clip's recording
        self.duration_s_C = np.array(seconds)

    def __len__(self) -> int:
        return len(self.clip_ids)

    def take(self, n: int) -> TokenClips:
        """The n clips of smallest identity hash: a larger n holds every clip of a smaller one.

        Raises ValueError when there are fewer than n, or n < 1.
        """
        if not 1 <= n <= len(self):
            raise ValueError(f"{n} clips asked for, but this side has {len(self)}; choose 1..{len(self)}")
        by_hash = sorted(range(len(self)), key=lambda c: identity_hash(self.clip_ids[c], salt="take"))
        return self.subset(np.sort(by_hash[:n]))

    def subset(self, chosen: npt.NDArray[np.integer]) -> TokenClips:
        """The clips of these numbers, in this order."""
        some = copy.copy(self)
        some._cache = OrderedDict()
        for name in ("clip_ids", "recording_ids", "texts"):
            setattr(some, name, [getattr(self, name)[c] for c in chosen])
        for name in ("shard_C", "_row_C", "n_frames_C", "n_chunks_C", "duration_s_C"):
            setattr(some, name, getattr(self, name)[chosen])
        return some

    def with_texts(self, texts: Sequence[str]) -> TokenClips:
        """The same clips with other texts, one per clip; raises ValueError for another number of them."""
        if len(texts) != len(self):
            raise ValueError(f"{len(texts)} texts were given for {len(self)} clips; give one per clip")
        other = copy.copy(self)
        other.texts = list(texts)
        return other

    def codes(self, clip: int) -> npt.NDArray[np.uint16]:
        """codes_KT of one clip; raises ValueError naming the shard when a token is outside the codebook."""
        return self._shard(int(self.shard_C[clip]))[self._row_C[clip]]

    def _shard(self, s: int) -> list[npt.NDArray[np.uint16]]:
        if s not in self._cache:
            column = pq.read_table(io.BytesIO(self._folder.read(self._files[s])), columns=["codes"])["codes"]
            clips = [self._codes_KT(c.values, self._files[s], row) for row, c in enumerate(column)]
            self._cache[s] = clips
            while len(self._cache) > _CACHED_SHARDS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(s)
        return self._cache[s]

    def _codes_KT(self, ids: pa.Array | None, file: str, row: int) -> npt.NDArray[np.uint16]:
        """The codes of one row, checked: integers of the codebook, as many for each codebook."""
        if ids is None or len(ids) % self.n_codebooks:
            held = "no codes" if ids is None else f"{len(ids)} codes, no multiple of {self.n_codebooks} codebooks"
            raise ValueError(f"{file} row {row} has {held}; the shard is damaged: delete it and tokenise again")
        if wrong := bad_id(ids, self.special.codebook_size - 1):
            raise ValueError(
                f"{wrong[1]} in {file} is outside the codebook of {self.special.codebook_size} (row {row}); "
                "the shard was not made by this codec: delete it and tokenise again"
            )
        return ids.to_numpy().astype(np.uint16, copy=False).reshape(self.n_codebooks, -1)


def plan_epoch(
    length_C: npt.NDArray[np.integer],
    group_C: npt.NDArray[np.integer],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    window: int = 32,
    jitter: float = 0.05,
) -> list[npt.NDArray[np.int64]]:
    """The clips of each batch of an epoch, each clip in exactly one batch.

    Groups (shards) are shuffled and taken ``window`` at a time, which bounds what must be in memory; within a window
    clips are sorted by length times a random factor of spread ``jitter`` (so that batches differ from epoch to
    epoch), cut into batches, and the batches shuffled. One batch per window may be smaller than ``batch_size``.
    Raises ValueError for a batch size or window below 1.
    """
    if batch_size < 1 or window < 1:
        raise ValueError(f"batch_size={batch_size} and window={window} must be >= 1")
    rng = np.random.default_rng([seed, epoch])
    groups = rng.permutation(np.unique(group_C))
    members = {int(g): np.flatnonzero(group_C == g) for g in groups}
    batches: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(groups), window):
        clips = np.concatenate([members[int(g)] for g in groups[start : start + window]])
        clips = rng.permutation(clips)
        order = np.argsort(length_C[clips] * np.exp(jitter * rng.standard_normal(len(clips))), kind="stable")
        cut = [clips[order[a : a + batch_size]] for a in range(0, len(clips), batch_size)]
        batches += [cut[i] for i in rng.permutation(len(cut))]
    return batches


def collate(clips: TokenClips, chosen: Sequence[int], index: int, max_frames: int | None, seed: int) -> TokenBatch:
    """One batch, as wide as its longest clip; clips longer than ``max_frames`` are cropped at a seeded place."""
    pieces = []
    for clip in chosen:
        codes_KT = clips.codes(int(clip))
        n = codes_KT.shape[1]
        if max_frames is not None and n > max_frames:
            start = int(
                np.random.default_rng([seed, identity_hash(clips.clip_ids[int(clip)])]).integers(n - max_frames + 1)
            )
            codes_KT = codes_KT[:, start : start + max_frames]
        pieces.append(codes_KT)
    width = max(p.shape[1] for p in pieces)
    codes_BKT = torch.full((len(pieces), clips.n_codebooks, width), clips.special.pad, dtype=torch.int64)
    for b, piece in enumerate(pieces):
        codes_BKT[b, :, : piece.shape[1]] = torch.from_numpy(piece.astype(np.int64))
    return TokenBatch(
        index=index,
        codes_BKT=codes_BKT,
        length_B=torch.tensor([p.shape[1] for p in pieces]),
        clip_ids=tuple(clips.clip_ids[int(c)] for c in chosen),
        texts=tuple(clips.texts[int(c)] for c in chosen),
        real_tokens=sum(p.size for p in pieces),
    )


def epoch_batches(clips: TokenClips, batch_size: int, *, seed: int = 0, epoch: int = 0) -> list[npt.NDArray[np.int64]]:
    """Clip numbers of every batch of the epoch; raises ValueError for a batch size below 1."""
    return plan_epoch(clips.n_frames_C, clips.shard_C, batch_size, seed=seed, epoch=epoch)


def evaluation_batches(
    clips: TokenClips, batch_size: int, *, max_frames: int | None = None, n_clips: int | None = None
) -> Iterator[TokenBatch]:
    """All clips (or the ``n_clips`` of smallest identity hash) once, shortest first, cropped at a fixed place.

    Raises ValueError for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be >= 1")
    chosen = sorted(range(len(clips)), key=lambda c: identity_hash(clips.clip_ids[c], salt="eval"))[:n_clips]
    chosen.sort(key=lambda c: (int(clips.n_frames_C[c]), clips.clip_ids[c]))
    for index, a in enumerate(range(0, len(chosen), batch_size)):
        yield collate(clips, chosen[a : a + batch_size], index, max_frames, seed=0)
