"""What the fingerprint of a proxy-gap cell holds: the hub's commits and how corrupt shards are met."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sweeps.core.cells import UserError
from sweeps.core.settings import RunSettings
from sweeps.sae import origin, sources
from sweeps.sae.origin import fingerprint, trajectory_name
from sweeps.sae.presets import PRESETS
from sweeps.sae.sweep import SWEEP

CELL = next(c for c in SWEEP.plan(PRESETS["fast2"]) if c.model == "pythia-70m")
DATASET = "NeelNanda/pile-small-tokenized-2b"


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A loopback hub that knows one commit of the model and one of the data set; change them in the dictionary."""
    known = {"model": "a" * 40, "dataset": "b" * 40}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.send_response(200 if self.path == "/EleutherAI/pythia-70m/resolve/main/config.json" else 404)
            for name, value in (("X-Repo-Commit", known["model"]), ("ETag", '"1"'), ("Content-Length", "0")):
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            known_path = self.path.startswith(f"/api/datasets/{DATASET}")
            body = json.dumps({"_id": "1", "id": DATASET, "sha": known["dataset"], "siblings": []}).encode()
            self.send_response(200 if known_path else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    _be_the_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    _forget()
    yield known
    server.shutdown()
    server.server_close()
    thread.join()
    _forget()


def _be_the_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """As if $HF_ENDPOINT had been set before the hub's client was imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


def _forget() -> None:
    origin._lm_origin.cache_clear()
    origin._stream_origin.cache_clear()


def of(**settings: str) -> tuple[str, str]:
    _forget()
    run = RunSettings(**settings)  # type: ignore[arg-type]
    return fingerprint(CELL, run), trajectory_name(CELL, run)


def test_commits_on_the_hub_are_part_of_fingerprint_and_checkpoint_name(commits: dict[str, str]) -> None:
    before = of()
    assert of() == before
    for kind in ("model", "dataset"):
        old, commits[kind] = commits[kind], "c" * 40
        changed = of()
        assert changed[0] != before[0]
        assert changed[1] != before[1]
        commits[kind] = old
    assert of() == before


def test_unknown_commit_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    _be_the_hub(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"commit of EleutherAI/pythia-70m.* --set lm_path=DIR"):
        of()


def test_leaving_out_corrupt_shards_makes_other_cells(commits: dict[str, str], tmp_path: Path) -> None:
    tokens = pa.array([np.arange(1024, dtype=np.int32)] * 8, type=pa.list_(pa.int32()))
    pq.write_table(pa.table({"tokens": tokens}), tmp_path / "train-00000.parquet")
    for where in ({}, {"stream_path": str(tmp_path)}):
        strict, lenient = of(**where), of(**where, on_corrupt="skip")
        assert strict[0] != lenient[0]
        assert strict[1] != lenient[1]


_spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).parents[2] / "data" / "hub_server.py")
assert _spec is not None
assert _spec.loader is not None
hub_server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub_server)
TINY: dict[str, Any] = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_mlp": 64, "d_vocab": 97}


def save_model(folder: Path, seed: int) -> Path:
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=97, **sizes)).save_pretrained(folder)
    return folder


def save_shard(folder: Path, seed: int) -> Path:
    rows = list(np.random.default_rng(seed).integers(0, 97, (200, 64), dtype=np.int32))
    folder.mkdir()
    pq.write_table(pa.table({"tokens": pa.array(rows, pa.list_(pa.int32()))}), folder / "train-00000.parquet")
    return folder


def test_a_repository_that_moves_on_is_read_at_the_commit_of_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Weights and text of another commit of the same sizes come up between the plan and two reads."""
    import torch

    from data import token_stream
    from data.token_stream import TokenStream
    from models.host.host_lm import load_host_lm
    from models.host.specs import HOST_LMS

    monkeypatch.setitem(HOST_LMS, "pythia-70m", replace(HOST_LMS["pythia-70m"], **TINY))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    cell = replace(CELL, context=64)
    models = [save_model(tmp_path / f"model{seed}", seed) for seed in (0, 1)]
    shards = [save_shard(tmp_path / f"shards{seed}", seed) for seed in (0, 1)]
    with hub_server.HubServer(shards[0], models[0]).running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        _be_the_hub(monkeypatch, hub.url)
        for cached in (token_stream._open, origin._lm_origin, origin._stream_origin):
            cached.cache_clear()
        run = origin.pin([cell], RunSettings())
        assert run.hub_commits == (f"EleutherAI/pythia-70m@{'a' * 40}", f"{DATASET}@{'a' * 40}")
        names = fingerprint(cell, run), trajectory_name(cell, run)
        unpinned = fingerprint(cell, RunSettings())
        assert names[0] == unpinned
        first = sources.open_stream(cell, run).eval_sequences(4)
        hub.move_on("d" * 40, shards[1], models[1])
        for cached in (token_stream._open, origin._lm_origin, origin._stream_origin):
            cached.cache_clear()  # as a worker on another node begins
        lm = sources.open_lm(cell, run, "cpu", print)
        second = sources.open_stream(cell, run).eval_sequences(4)
        assert (fingerprint(cell, run), trajectory_name(cell, run)) == names
        assert fingerprint(cell, RunSettings()) != unpinned
        assert origin.pin([cell], run) == run
        moved = origin.pin([cell], RunSettings())
        there = sources.open_lm(cell, moved, "cpu", print)
        third = sources.open_stream(cell, moved).eval_sequences(4)
    local = [load_host_lm("pythia-70m", lm_path=folder) for folder in models]
    texts = [TokenStream(source=str(folder), context=64).eval_sequences(4) for folder in shards]
    weights = [torch.cat([p.flatten() for p in each.model.parameters()]) for each in (lm, there, *local)]
    assert torch.equal(weights[0], weights[2])
    assert torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])
    for got, expected in ((first, texts[0]), (second, texts[0]), (third, texts[1])):
        assert np.array_equal(got, expected)
    assert not np.array_equal(texts[0], texts[1])


def test_commits_that_are_none_or_of_no_use_are_refused(commits: dict[str, str]) -> None:
    with pytest.raises(UserError, match="hub_commits='x/y@main' names no commit"):
        RunSettings(hub_commits=("x/y@main",))
    with pytest.raises(UserError, match="names x/y, which these cells do not read"):
        origin.pin([CELL], RunSettings(hub_commits=(f"x/y@{'a' * 40}",)))
    older = RunSettings(hub_commits=(f"EleutherAI/pythia-70m@{'e' * 40}",))
    assert origin.pin([CELL], older).hub_commits[0] == older.hub_commits[0]


def test_a_data_set_named_as_stream_path_is_pinned_too(commits: dict[str, str]) -> None:
    run = origin.pin([CELL], RunSettings(stream_path=f"hf://datasets/{DATASET}/other"))
    assert sources.open_stream(CELL, run).source == f"hf://datasets/{DATASET}@{commits['dataset']}/other"
    own = RunSettings(stream_path=f"hf://datasets/{DATASET}@v1/other")
    assert sources.open_stream(CELL, own).source == own.stream_path


def test_a_checkpoint_that_does_not_fit_ends_the_launch_before_any_pack_and_in_a_pack(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from models.host.specs import HOST_LMS

    monkeypatch.setitem(HOST_LMS, "pythia-70m", replace(HOST_LMS["pythia-70m"], **TINY))
    folder = save_model(tmp_path / "lm", 0)
    file = folder / "model.safetensors"
    save_file({f"module.{k}": v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    cell = replace(CELL, stream="embedded", context=64)
    run = RunSettings(lm_path=str(folder))
    for ask in (
        lambda: SWEEP.preflight([cell], PRESETS["fast2"], run),
        lambda: sources.open_lm(cell, run, "cpu", print),
    ):
        with pytest.raises(UserError, match=r"28 missing .*28 unexpected \(module\..*take the prefix 'module\.' off"):
            ask()


def test_hidden_files_beside_a_checkpoint_are_no_part_of_its_origin(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "lm", 0)
    run = RunSettings(lm_path=str(folder))
    before = origin._lm_origin("x", run.lm_path, ())
    (folder / "._model.safetensors").write_bytes(b"left by macOS")
    _forget()
    assert origin._lm_origin("x", run.lm_path, ()) == before
