"""What the fingerprint of a proxy-gap cell holds: the hub's commits and how corrupt shards are met."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sweeps import _sae_sources
from sweeps._sae_sources import fingerprint, trajectory_name
from sweeps._sweep import UserError
from sweeps._where import RunSettings
from sweeps.proxy_gap import PRESETS, SWEEP

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
    _sae_sources._lm_origin.cache_clear()
    _sae_sources._stream_origin.cache_clear()


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
