"""Audio set to Parquet shards of codec tokens: resumable shard by shard, the same with and without Ray.

A shard's name carries a hash of everything that decides its contents (codec, weights, chunking, the recordings' bytes
and texts), and it is published atomically with the list of what was odd about its recordings inside. A shard that
exists is therefore finished and right, whatever was killed when; the manifest only sums them up.

    OUT/manifest.json
    OUT/shards/00003-9f86d081884c.parquet   clip_id, recording_id (of a copy: its original's), chunk, n_chunks, text,
                                            duration_s, n_frames, codes (list<uint16>, row-major [K, T])
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fsspec.implementations.local import LocalFileSystem

from data._atomic import write_whole
from data._launched import check
from data.audio_io import AudioSet, Oddity, Recording, counts, first_of_each, read_clips, with_contents
from data.codec import Codec, CodecSpec
from data.split import identity_hash

MANIFEST = "manifest.json"
_FACTS = b"plumbline"
_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("recording_id", pa.string()),
        ("chunk", pa.int32()),
        ("n_chunks", pa.int32()),
        ("text", pa.string()),
        ("duration_s", pa.float64()),
        ("n_frames", pa.int32()),
        ("codes", pa.list_(pa.uint16())),
    ]
)


class Folder:
    """A folder on any fsspec URI whose files appear whole or not at all."""

    def __init__(self, uri: str) -> None:
        self.uri = str(uri)
        self.fs, root = fsspec.url_to_fs(self.uri)
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    def exists(self, name: str) -> bool:
        self.fs.invalidate_cache()
        return bool(self.fs.exists(f"{self.root}/{name}"))

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(f"{self.root}/{name}")

    def publish(self, name: str, data: bytes) -> None:
        """Write one file atomically: rename on a disk, one PUT on an object store."""
        target = f"{self.root}/{name}"
        if self.local:
            write_whole(target, data)
        else:
            self.fs.pipe_file(target, data)


@dataclass(frozen=True)
class Actors:
    """Ray Data actors that code shards, and what each of them takes."""

    count: int = 1
    cpus: float = 1
    gpus: float = 0


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be made: its file name and its recordings."""

    file: str
    recordings: tuple[Recording, ...]


@dataclass(frozen=True)
class Tokens:
    """A finished token set: its manifest, and how many shards the last call had to compute."""

    folder: str
    manifest: dict[str, Any]
    computed: int = 0

    @property
    def oddities(self) -> list[Oddity]:
        return [Oddity(*o) for o in self.manifest["oddities"]]


def identity(audio: AudioSet, codec: Codec, chunk_s: float, min_s: float) -> dict[str, Any]:
    """What the tokens of a set depend on besides the audio itself."""
    return {"dataset": audio.name, "codec": codec.describe(), "chunk_s": chunk_s, "min_s": min_s}


def plan_shards(audio: AudioSet, facts: dict[str, Any], recordings_per_shard: int) -> list[ShardPlan]:
    """Cut the recordings, in order of their ids, into shards named by position and by hash of all they depend on."""
    if recordings_per_shard < 1:
        raise ValueError(f"recordings_per_shard={recordings_per_shard} must be >= 1")
    base = json.dumps(facts, sort_keys=True)
    plans = []
    for number, start in enumerate(range(0, len(audio.recordings), recordings_per_shard)):
        some = audio.recordings[start : start + recordings_per_shard]
        contents = json.dumps([[r.recording_id, r.content, r.same_as, r.text] for r in some])
        plans.append(ShardPlan(f"shards/{number:05d}-{identity_hash(base + contents):016x}.parquet", some))
    return plans


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_shard(audio: AudioSet, plan: ShardPlan, codec: Codec, facts: dict[str, Any]) -> bytes:
    """The shard's Parquet file. One clip at a time on one thread, so that its bytes do not depend on who makes it."""
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    odd: list[Oddity] = []
    with _threads(1):
        for recording in plan.recordings:
            clips, strange = read_clips(
                audio, recording, sample_rate=codec.sample_rate, chunk_s=facts["chunk_s"], min_s=facts["min_s"]
            )
            odd += strange
            for clip in clips:
                codes_KT = codec.encode(clip.wave_N[None], clip.sample_rate)[0]
                row = {
                    "clip_id": clip.clip_id,
                    "recording_id": recording.unit,
                    "chunk": clip.chunk,
                    "n_chunks": clip.n_chunks,
                    "text": clip.text,
                    "duration_s": clip.duration_s,
                    "n_frames": codes_KT.shape[1],
                    "codes": codes_KT.ravel(),
                }
                for name, value in row.items():
                    columns[name].append(value)
    return _shard_bytes(columns, {**facts, "oddities": odd})


def _shard_bytes(columns: dict[str, list[Any]], stored: dict[str, Any]) -> bytes:
    schema = _SCHEMA.with_metadata({_FACTS: json.dumps(stored, sort_keys=True).encode()})
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), sink, compression="zstd")
    return sink.getvalue()


def save_codes(dataset: str, codec: Codec, clips: Mapping[str, npt.NDArray[np.uint16]], out: str) -> Tokens:
    """A token set of codes [K, T] that no audio was coded for, by clip id: one shard, replacing what `out` held."""
    facts = {"dataset": dataset, "codec": codec.describe(), "chunk_s": 0.0, "min_s": 0.0}
    columns: dict[str, list[Any]] = {
        "clip_id": list(clips),
        "recording_id": list(clips),
        "chunk": [0] * len(clips),
        "n_chunks": [1] * len(clips),
        "text": [""] * len(clips),
        "duration_s": [c.shape[1] / codec.frame_rate_hz for c in clips.values()],
        "n_frames": [c.shape[1] for c in clips.values()],
        "codes": [c.ravel() for c in clips.values()],
    }
    folder, file = Folder(out), "shards/00000.parquet"
    folder.publish(file, _shard_bytes(columns, {**facts, "oddities": []}))
    manifest = _sum_up(folder, facts, [file], [], len(clips))
    folder.publish(MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
    return Tokens(out, manifest, 1)


class _ShardMaker:
    """Ray Data actor: loads the codec once, then makes and publishes one shard per row."""

    def __init__(self, audio: AudioSet, codec: CodecSpec, facts: dict[str, Any], folder: str) -> None:
        check()
        self.audio, self.facts, self.folder = audio, facts, Folder(folder)
        self.codec = codec.load()
        if self.codec.describe() != facts["codec"]:
            raise RuntimeError(f"an actor loaded {self.codec.describe()}, the driver {facts['codec']}: mixed versions")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        plan = row["plan"]
        self.folder.publish(plan.file, make_shard(self.audio, plan, self.codec, self.facts))
        return {"file": plan.file}


def _make_with_ray(
    audio: AudioSet,
    codec: CodecSpec,
    facts: dict[str, Any],
    folder: str,
    plans: list[ShardPlan],
    actors: Actors,
) -> None:
    import ray.data

    rows = ray.data.from_items([{"plan": p} for p in plans], override_num_blocks=len(plans))
    done = rows.map(
        _ShardMaker,  # type: ignore[arg-type]
        fn_constructor_args=(replace(audio, recordings=(), oddities=()), codec, facts, folder),
        compute=ray.data.ActorPoolStrategy(size=min(actors.count, len(plans))),
        num_cpus=actors.cpus,
        num_gpus=actors.gpus,
    )
    for _row in done.iter_rows():
        pass


def read_facts(folder: Folder, file: str) -> tuple[dict[str, Any], pa.Table]:
    """A shard's facts, and its table without the codes; raises ValueError for a damaged or foreign file."""
    try:
        shard = pq.ParquetFile(io.BytesIO(folder.read(file)))
        stored = (shard.schema_arrow.metadata or {})[_FACTS]
        return json.loads(stored), shard.read(columns=[n for n in _SCHEMA.names if n != "codes"])
    except (pa.ArrowInvalid, KeyError) as error:
        raise ValueError(
            f"{file} in {folder.uri} is damaged or not a token shard ({error}); delete it, run again"
        ) from error


def tokenise(
    audio: AudioSet,
    codec: CodecSpec,
    out: str,
    *,
    chunk_s: float,
    min_s: float = 1.0,
    recordings_per_shard: int = 64,
    actors: Actors | None,
) -> Tokens:
    """Code every clip of an audio set; call it again with the same arguments to continue after a crash.

    Args:
        audio: from open_ljspeech, open_fma or the like; its files must be visible to every actor.
        codec: which codec and weights; its device is that of the actors, or of this process without Ray.
        out: folder, local or fsspec URI; shared by all nodes of a cluster.
        chunk_s, min_s: clips are cut at ``chunk_s`` seconds, and rests shorter than ``min_s`` seconds dropped.
        recordings_per_shard: unit of work that a crash can cost.
        actors: Ray Data actors in the Ray that is initialised; None: this process codes. The bytes are the same.
    Returns:
        Tokens with the manifest: dataset, codec (with weights hash and caveat), totals, shards, odd files.
    Raises:
        ValueError: nothing to code, or ``out`` holds tokens of another codec, chunking or data set.
        MissingCodecWeights.
    """
    if not audio.recordings:
        raise ValueError(f"{audio.name} lists no recordings; odd files: {first_of_each(audio.oddities)}")
    if not all(r.content for r in audio.recordings):
        audio = with_contents(audio)
    folder = Folder(out)
    loaded = codec.on_driver(actors is not None).load()
    if min_s * loaded.sample_rate < loaded.hop:
        raise ValueError(f"min_s={min_s} is shorter than one frame of {loaded.name}; use >= {loaded.hop} samples")
    facts = identity(audio, loaded, chunk_s, min_s)
    _require_same_tokens(folder, out, facts)
    plans = plan_shards(audio, facts, recordings_per_shard)
    missing = [p for p in plans if not folder.exists(p.file)]
    if missing and actors is not None:
        _make_with_ray(audio, codec, facts, out, missing, actors)
    else:
        for plan in missing:
            folder.publish(plan.file, make_shard(audio, plan, loaded, facts))
    manifest = _sum_up(folder, facts, [p.file for p in plans], list(audio.oddities), len(audio.recordings))
    if not manifest["n_clips"]:
        odd = first_of_each(Oddity(*o) for o in manifest["oddities"])
        raise ValueError(f"no clip of {audio.name} could be coded; odd files: {odd}")
    folder.publish(MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
    return Tokens(out, manifest, len(missing))


def _require_same_tokens(folder: Folder, out: str, facts: Mapping[str, Any]) -> None:
    """Raise ValueError where `out` was finished with another codec, chunking or data set."""
    if not folder.exists(MANIFEST):
        return
    found = json.loads(folder.read(MANIFEST))
    differing = [k for k in facts if found.get(k) != facts[k]]
    if differing:
        raise ValueError(
            f"{out} holds tokens with another {' and '.join(differing)} "
            f"({', '.join(f'{k}: {found.get(k)} not {facts[k]}' for k in differing)}); choose another folder"
        )


def _sum_up(
    folder: Folder, facts: dict[str, Any], files: list[str], odd: list[Oddity], n_recordings: int
) -> dict[str, Any]:
    shards: list[dict[str, Any]] = []
    for file in files:
        stored, table = read_facts(folder, file)
        odd += [Oddity(*o) for o in stored["oddities"]]
        frames = np.asarray(table["n_frames"])
        seconds = float(np.asarray(table["duration_s"]).sum())
        shards.append({"file": file, "n_clips": len(table), "n_frames": int(frames.sum()), "audio_s": seconds})
    totals = {key: sum(s[key] for s in shards) for key in ("n_clips", "n_frames", "audio_s")}
    return {
        **facts,
        **totals,
        "n_recordings": n_recordings,
        "n_tokens": totals["n_frames"] * facts["codec"]["n_codebooks"],
        "shards": shards,
        "odd": counts(odd),
        "oddities": [list(o) for o in odd],
    }


def open_tokens(out: str) -> Tokens:
    """Tokens made before; raises FileNotFoundError where `tokenise` has not finished."""
    folder = Folder(out)
    if not folder.exists(MANIFEST):
        raise FileNotFoundError(f"no {MANIFEST} in {out}; run data.codec_shards.tokenise to its end first")
    return Tokens(out, json.loads(folder.read(MANIFEST)))
