"""What MLflow opens on: its tags, its addresses, and the page itself in a browser where one is installed."""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from sweeps.core.cells import Row
from sweeps.launch import first_view
from sweeps.launch.first_view import Chart, View, runs_address, share
from sweeps.launch.tracking import Plan, Tracker
from sweeps.ledger.claims import Claims
from sweeps.ledger.ledger import Ledger
from tests.sweeps.browser import PROGRAMS, program, seen
from tests.sweeps.toy_sweep import Square

SWEEPS = ["sae.sweep", "codec.sweep", "caching.sweep", "topology.sweep"]
VIEW = View(
    params=("n",),
    metrics=("square",),
    charts=(Chart("by n", "scatter", "square", "n", x_param=True), Chart("curve", "line", "curve")),
)


class Client:
    """Keeps the tags of one experiment."""

    def __init__(self, **tags: str) -> None:
        self.tags = tags
        self.written: list[str] = []

    def get_experiment(self, experiment: str) -> Any:
        return SimpleNamespace(tags=dict(self.tags))

    def set_experiment_tag(self, experiment: str, name: str, value: str) -> None:
        assert len(value) <= 5000  # what every store of MLflow takes
        self.written.append(name)
        self.tags[name] = value


def state_of(client: Client, key: str) -> Any:
    """What MLflow's page makes of the shared view, as its own code unpacks it."""
    envelope = json.loads(client.tags[f"mlflow.sharedViewState.{key}"])
    assert set(envelope) == {"name", "createdAt", "updatedAt", "state"}
    head, _, packed = envelope["state"].partition(";")
    assert head == "deflate"
    return json.loads(zlib.decompress(base64.b64decode(packed)))


@pytest.mark.parametrize("module", SWEEPS)
def test_the_view_of_a_sweep_names_what_its_cells_have(module: str) -> None:
    sweep: Any = importlib.import_module(f"sweeps.{module}").SWEEP
    presets = [
        preset for name, preset in sweep.presets.items() if name != "released"
    ]  # which plans the SAEs it is given
    fields = {name for preset in presets for cell in sweep.plan(preset) for name in cell.identity()}
    by_field = {chart.x for chart in sweep.view.charts if chart.x_param}
    assert {*sweep.view.params, *by_field} <= fields
    assert sweep.view.metrics
    client = Client()
    key = share(client, "sqlite:///x.db", "1", sweep.view, "0123abcd", "local")
    state = state_of(client, key)
    assert client.tags["mlflow.experimentKind"] == "custom_model_development"
    assert state["searchFilter"] == "tags.`plumbline.grid` LIKE '%0123abcd%'"
    assert [chart["displayName"] for chart in state["compareRunCharts"]] == [c.title for c in sweep.view.charts]
    assert state["orderByKey"] != "attributes.start_time"  # by which MLflow nests cells in a closed row


def test_a_view_is_written_once_and_a_chosen_kind_stays() -> None:
    client = Client(**{"mlflow.experimentKind": "genai_development"})
    key = share(client, "sqlite:///x.db", "1", VIEW, "0123abcd", "local")
    assert client.written == [f"mlflow.sharedViewState.{key}"]
    assert share(client, "sqlite:///x.db", "1", VIEW, "0123abcd", "local") == key
    assert len(client.written) == 1
    assert share(client, "sqlite:///x.db", "1", View(), "0123abcd", "local") != key  # another view, another address


@pytest.mark.parametrize("version", ["3.16.0", "3.18.1", "4.0", ""])
def test_another_mlflow_gets_a_plain_search(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_view, "server_version", lambda uri: version)
    client = Client()
    assert share(client, "http://host:5000", "7", VIEW, "0123abcd", "local") == ""
    assert client.written == ["mlflow.experimentKind"]
    address = urlsplit(runs_address("http://host:5000", "7", "0123abcd", "").replace("#/", ""))
    assert address.path == "/experiments/7/runs"
    assert parse_qs(address.query) == {
        "workflowType": ["machine_learning"],
        "searchFilter": ["tags.`plumbline.grid` LIKE '%0123abcd%'"],
        "orderByKey": ["tags.`plumbline.kind`"],
        "orderByAsc": ["false"],
    }


def test_addresses_are_short_enough_for_a_screen() -> None:
    plain, view = (runs_address("http://127.0.0.1:5000", "1", "0123abcd", v) for v in ("", "plumbline-0123abcd-12ef"))
    assert len(plain) < 250
    assert len(view) < 150
    assert "viewStateShareKey=plumbline-0123abcd-12ef" in view
    assert "searchFilter" not in view  # beside it MLflow would not open the view


def test_the_version_of_a_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    assert first_view.server_version("sqlite:///x.db") == mlflow.__version__
    answer = SimpleNamespace(status_code=404, text="no such page")
    monkeypatch.setattr("mlflow.utils.rest_utils.http_request", lambda *a, **k: answer)
    assert first_view.server_version("http://host:5000") == ""


def test_a_launch_whose_view_cannot_be_shared_still_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*a: Any) -> str:
        raise PermissionError("no tags for you")

    monkeypatch.setattr("sweeps.launch.tracking.share", refuses)
    ledger, tracker = filled(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    tracker.want(ledger.done())
    assert tracker.finish("FINISHED", {}, [])
    assert "searchFilter=" in tracker.runs_link()
    tracker.claims.release()


def filled(folder: Path, uri: str) -> tuple[Ledger, Tracker]:
    """Squares of 11, 12 and 13 in a ledger, and a tracker of a launch of that grid, started."""
    ledger = Ledger(str(folder / "ledger"), "toy", "1")
    cells = [Square(n=n) for n in (11, 12, 13)]
    for cell in cells:
        rows = [Row("square", cell.n**2), *(Row("curve", s / cell.n, params={"step": s}) for s in (1, 2, 3))]
        ledger.publish(cell, rows, {}, {"fingerprint": "", "published_unix": 1.7e9 + cell.n, "pack_seconds": 9.0})
    tracker = Tracker(uri, ledger, Claims(ledger.store), artifact_mb=1.0, say=print, named=("model", "n"))
    by_key = {cell.key: cell for cell in cells}
    tracker.start({"cells": 3}, {}, Plan(by_key, list(by_key), VIEW, "small"))
    return ledger, tracker


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """An MLflow server on the loopback interface; gives its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    where = ["--artifacts-destination", str(folder), "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with open(folder / "server.txt", "w") as out:
        process = subprocess.Popen(
            [*command, *where],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(not program(), reason=f"no browser: none of {', '.join(PROGRAMS)} is installed")
def test_a_reader_sees_the_launch_the_cells_their_numbers_and_the_charts(tmp_path: Path) -> None:
    with server(tmp_path) as uri:
        ledger, tracker = filled(tmp_path, uri)
        tracker.want(ledger.done())
        assert tracker.finish("FINISHED", {}, [])
        link = tracker.runs_link()
        tracker.claims.release()
        assert "viewStateShareKey" in link
        names = [f"launch {tracker.claims.launch_id}", *(f"square n={n}" for n in (13, 12, 11))]

        def has(text: str) -> bool:
            return all(name in text for name in names)

        charts = seen(link, lambda text: has(text) and "n vs. square" in text)
        assert has(charts)
        for shown in ("Model training", "small (", "The question", "n vs. square", "curve", "4 matching runs"):
            assert shown in charts, shown
        table = seen(link.replace("CHART", "TABLE"), lambda text: has(text) and "144" in text.split())
        assert [line for line in table.splitlines() if line in names] == names  # flat, the launch first
        assert {"121", "144", "169"} <= set(table.split())
        assert "No data available" not in table
        plain = seen(runs_address(uri, tracker._experiment, tracker._grid, ""), has)
        assert [line for line in plain.splitlines() if line in names] == names


def test_a_search_opens_on_its_fields_and_its_objective() -> None:
    view = VIEW.of_search(["lr", "batch_size"], ["ce_rec", "l0"])
    state = first_view._state(view, "0123abcd")
    shown = [c["displayName"] for c in state["compareRunCharts"]]
    assert shown[:2] == ["ce_rec by lr", "ce_rec by batch_size"]
    assert shown[2:] == [chart.title for chart in VIEW.charts]
    assert list(view.params)[:2] == ["lr", "batch_size"]
    assert list(view.metrics)[:2] == ["ce_rec", "l0"]
    assert len(set(view.params)) == len(view.params)


def test_an_objective_by_its_name_alone_is_charted_as_mlflow_spells_it() -> None:
    view = View(metrics=("final_val_nll/ema", "final_val_nll/raw")).of_search(["lr"], ["final_val_nll", "size"])
    assert view.charts[0] == Chart("final_val_nll/ema by lr", "scatter", "final_val_nll/ema", "lr", x_param=True)
    assert list(view.metrics) == ["final_val_nll/ema", "size", "final_val_nll/raw"]
