"""Streams through Ray Data: the plain iterator's sequences, from any start, while a trial holds the node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.token_stream import EMBEDDED, CorruptShard, TokenStream

ROOT = str(Path(__file__).resolve().parents[2])
T = 16


@pytest.fixture(scope="module")
def ray_of_two_cpus():
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": ROOT}},
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> TokenStream:
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for i, n in enumerate((1500, 3, 40, 2500, 900)):
        rows = list(rng.integers(0, 50304, (n, 24), dtype=np.int32))
        table = pa.table({"tokens": pa.array(rows, pa.list_(pa.int32()))})
        pq.write_table(table, folder / f"s{i}.parquet", row_group_size=200)
    return TokenStream(source=str(folder), context=T, holdout_every=8)


def collect(reader) -> tuple[np.ndarray, np.ndarray]:
    pieces = [(np.arange(first, first + len(tokens_ST)), tokens_ST) for first, tokens_ST in reader]
    if not pieces:
        return np.empty(0, np.int64), np.empty((0, T), np.int32)
    return np.concatenate([i for i, _ in pieces]), np.concatenate([t for _, t in pieces])


@pytest.mark.slow
def test_ray_equals_the_plain_iterator_from_several_starts(ray_of_two_cpus, stream):
    _, whole = collect(stream.sequences(use_ray=False))
    assert len(whole) == stream.n_train()
    for start in (0, 700, 1310, len(whole) - 3, len(whole)):
        indices, tokens_ST = collect(stream.sequences(start, use_ray=True))
        assert np.array_equal(indices, np.arange(start, len(whole)))
        assert np.array_equal(tokens_ST, whole[start:])


def test_early_close_and_a_start_within_a_shard(ray_of_two_cpus, stream):
    _, whole = collect(stream.sequences(use_ray=False))
    with stream.sequences(use_ray=True) as reader:
        first, tokens_ST = next(reader)
        start = first + len(tokens_ST) - 5
    _, tail = collect(stream.sequences(start, use_ray=True))
    assert np.array_equal(tail, whole[start:])


def test_errors_surface_at_their_place_in_the_order(ray_of_two_cpus, stream, tmp_path):
    for path in Path(stream.source).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "s3.parquet").write_bytes(b"not parquet")
    broken = TokenStream(source=str(tmp_path), context=T, holdout_every=8)
    before: list[np.ndarray] = []
    with pytest.raises(CorruptShard, match=r"s3\.parquet"):
        before.extend(tokens_ST for _, tokens_ST in broken.sequences(use_ray=True))
    _, whole = collect(stream.sequences(use_ray=False))
    n_before = sum(map(len, before))
    assert n_before == broken._shards().n_train(0) + broken._shards().n_train(1) + broken._shards().n_train(2)
    assert np.array_equal(np.concatenate(before), whole[:n_before])
    lenient = TokenStream(source=str(tmp_path), context=T, holdout_every=8, on_corrupt="skip")
    reader = lenient.sequences(use_ray=True)
    with pytest.warns(UserWarning, match=r"skipped: shard s3\.parquet"):
        _, rest = collect(reader)
    assert len(reader.corrupt) == 1
    assert np.array_equal(rest[n_before:], whole[len(whole) - (len(rest) - n_before) :])


def test_stream_runs_inside_a_task_that_holds_nearly_every_cpu(ray_of_two_cpus, stream):
    ray = ray_of_two_cpus

    @ray.remote(num_cpus=1.9)
    def trial(description: TokenStream) -> tuple[int, int]:
        n = total = 0
        with description.sequences(use_ray=True) as reader:
            for _, tokens_ST in reader:
                n, total = n + len(tokens_ST), total + int(tokens_ST.sum())
        return n, total

    done, waiting = ray.wait([trial.remote(stream)], timeout=120)
    assert not waiting, "the stream waited for CPUs that its own consumer holds"
    _, whole = collect(stream.sequences(use_ray=False))
    assert ray.get(done[0]) == (len(whole), int(whole.sum()))


@pytest.mark.slow
def test_stream_runs_inside_a_tune_trial_that_holds_nearly_every_cpu(ray_of_two_cpus, tmp_path):
    from ray import tune

    description = TokenStream(source=EMBEDDED, tokenizer="byte", context=64)

    def trial(config: dict) -> None:
        n = 0
        with description.sequences(100, use_ray=True) as reader:
            for _, tokens_ST in reader:
                n += len(tokens_ST)
                if n > 5000:
                    break
        tune.report({"n": n})

    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": 1.9}),
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="stream", verbose=0),
    )
    (result,) = tuner.fit()
    assert result.error is None
    assert result.metrics["n"] > 5000
