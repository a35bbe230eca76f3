"""The four sweeps at tiny size and the toy sweep, their undisturbed results, and what must hold after any fault."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sweeps.ledger.ledger import Ledger
from tests.sweeps.tiny_proxy_gap import MODEL, save_lm, save_shards, settings, tiny_grid

_CLOCKS = {"tokens_per_second"}  # metrics that measure the machine, not the model
_MODULES = {
    "proxy_gap": "sweeps.sae.sweep",
    "odor_topology": "sweeps.topology.sweep",
    "codec_lm": "sweeps.codec.sweep",
    "memory_cache": "sweeps.caching.sweep",
}


@dataclass(frozen=True)
class Tiny:
    """A sweep at tiny size, by the arguments of its command line."""

    name: str
    arguments: tuple[str, ...]
    module: str = ""

    @property
    def script(self) -> str:
        return f"{self.name}.py"

    @property
    def home(self) -> str:
        """The module that holds SWEEP."""
        return self.module or _MODULES[self.name]

    def ledger(self, storage: str) -> Ledger:
        """The ledger of launches on `storage`."""
        return Ledger(storage, self.name, importlib.import_module(self.home).SWEEP.version)


def proxy_gap(sources: Path, **changes: object) -> Tiny:
    """An SAE with two nested budgets on random weights and random bytes."""
    if not (sources / MODEL).exists():
        save_lm(sources, MODEL)
        save_shards(sources / "shards", shards=2, rows=400, length=64, vocab=257)
    smaller: dict[str, object] = {
        "k": 8,
        "tokens": "8192,16384",
        "expansion": 1,
        "eval_sequences": 4,
        "checkpoint_seconds": 0,
        "max_retries": 9,
    }
    return Tiny("proxy_gap", tuple(tiny_grid(sources, sources / "shards", **smaller | changes)))


def odor_topology(sources: Path, **changes: object) -> Tiny:
    """Diagrams of small point clouds, a few null draws."""
    grid: dict[str, object] = {
        "table": "cloud:circle",
        "clouds": "gaussian_blob",
        "rows": 40,
        "runs": 1,
        "draws": 4,
        "full_draws": 2,
        "draws_per_cell": 2,
        "threads": 1,
        "max_retries": 9,
    }
    return Tiny("odor_topology", ("--preset", "audit", *settings(**grid | changes)))


def codec_lm(sources: Path, **changes: object) -> Tiny:
    """Two architectures, six steps each, on synthetic speech."""
    grid: dict[str, object] = {
        "architectures": "transformer,la",
        "lr": 3e-3,
        "corpus_clips": 40,
        "chunk_s": 1.5,
        "min_s": 1.0,
        "holdout": 0.3,
        "steps": 6,
        "batch_size": 2,
        "warmup_steps": 2,
        "eval_every": 3,
        "eval_clips": 3,
        "sample_s": 0,
        "threads": 1,
        "checkpoint_seconds": 0,
        "max_retries": 9,
    }
    return Tiny("codec_lm", ("--preset", "local", *settings(**grid | changes)))


def memory_cache(sources: Path, **changes: object) -> Tiny:
    """The base setting, one variable of memory caching and their controls, four steps each, on synthetic speech."""
    grid: dict[str, object] = {
        "variables": "normalized_retrieval",
        "together": "",
        "planted": "false",
        "train_clips": 9,
        "segment": 16,
        "seeds": "1,2",
        "corpus_clips": 40,
        "codebook_size": 256,
        "chunk_s": 1.0,
        "min_s": 0.8,
        "holdout": 0.3,
        "steps": 4,
        "batch_size": 2,
        "warmup_steps": 1,
        "eval_every": 2,
        "eval_clips": 4,
        "threads": 1,
    }
    return Tiny("memory_cache", ("--preset", "local", *settings(**grid | changes)))


def toy(sources: Path, **changes: object) -> Tiny:
    """Twelve squares, one per pack: for faults that concern the machinery alone."""
    grid: dict[str, object] = {"n": ",".join(map(str, range(12))), "pack_size": 1, "max_retries": 9}
    return Tiny("toy", tuple(settings(**grid | changes)), "tests.sweeps.toy_sweep")


SWEEPS: dict[str, Callable[..., Tiny]] = {
    "proxy_gap": proxy_gap,
    "odor_topology": odor_topology,
    "codec_lm": codec_lm,
    "memory_cache": memory_cache,
    "toy": toy,
}


Results = dict[str, dict[str, Any]]


def results(ledger: Ledger) -> Results:
    """{key: {file: content}} of all published cells: bytes; tables without what measures the machine."""
    out: Results = {}
    assert ledger.done(), f"nothing is published in {ledger.store.uri}"
    for key in ledger.done():
        cell = ledger.read(key)
        assert cell.identity
        files: dict[str, Any] = {name: ledger.file(key, name) for name in cell.files if name != "cell.json"}
        rows = pd.read_parquet(io.BytesIO(files["rows.parquet"]))
        files["rows.parquet"] = rows[~rows["metric"].isin(_CLOCKS)].reset_index(drop=True)
        if "rungs.parquet" in files:  # the time that each proxy took
            files["rungs.parquet"] = pd.read_parquet(io.BytesIO(files["rungs.parquet"])).drop(columns="passes")
        out[key] = files
    return out


def assert_same(found: Results, expected: Results) -> None:
    """Every cell of the undisturbed run is there once, with the same bits."""
    assert found.keys() == expected.keys()
    for key, files in expected.items():
        assert found[key].keys() == files.keys()
        for name, content in files.items():
            if isinstance(content, pd.DataFrame):
                pd.testing.assert_frame_equal(found[key][name], content, check_exact=True)
            else:
                assert found[key][name] == content, f"{name} of {key} differs"


def assert_tidy(ledger: Ledger) -> None:
    """Nothing partial is visible: published folders hold what their cell.json names, and no failure is on record."""
    for key in ledger.done():
        files = json.loads(ledger.file(key, "cell.json"))["files"]
        sizes = {name: known["size"] for name, known in files.items()}
        attempt = ledger.store.marker(key)[
            "attempt"
        ]  # on object stores; other attempts may have left files in their folders
        home = f"{key}/{attempt}" if attempt else key
        found = {name: len(ledger.store.read(f"{home}/{name}")) for name in ledger.store.files(home)}
        found.pop("_PUBLISHED", None)
        del found["cell.json"]
        assert found == sizes
    for name in ledger.store.names():
        assert name[0] in "_." or name in ledger.done(), f"{name} is visible and no published cell"
    assert ledger.store.names("_failed") == []


def assert_tracked(tiny: Tiny, uri: str, place: str, expected: Results, launches: int) -> None:
    """MLflow holds exactly one finished run per cell with the ledger's numbers, and at most one run per launch."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(f"plumbline/{tiny.name}")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    cells = [r for r in runs if r.data.tags["plumbline.kind"] == "cell"]
    assert sorted(r.data.tags["plumbline.cell_uri"] for r in cells) == sorted(f"{place}/{key}" for key in expected)
    assert {r.info.status for r in cells} == {"FINISHED"}
    for run in cells:
        rows = expected[run.data.tags["plumbline.cell_key"]]["rows.parquet"]
        plain = rows[rows[[c for c in rows.columns if c not in ("metric", "value", "unit")]].isna().all(axis=1)]
        for metric, value in zip(plain["metric"], plain["value"], strict=True):
            if value == value:
                assert run.data.metrics[metric] == value, metric
    assert "RUNNING" not in {r.info.status for r in runs}
    parents = [r.data.tags["plumbline.launch"] for r in runs if r.data.tags["plumbline.kind"] == "launch"]
    assert len(parents) == len(set(parents)), "a launch has two runs"
    assert 1 <= len(parents) <= launches
