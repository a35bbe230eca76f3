"""One run a cell in MLflow, with its files, also where a copy takes longer than the end of the launch may wait."""

from __future__ import annotations

import importlib
import threading
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pandas as pd
import pytest

from benchmarks import scale
from sweeps._claims import Claims
from sweeps._ledger import Ledger
from sweeps._sweep import PublishedCell, UserError
from sweeps._track import Tracker, _name, _points, _quoted
from tests.sweeps.mlflow_runs import runs_of_cells


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(str(tmp_path / "o'ledger"), "scale", "1")  # a quote that the searches must survive
    scale.fill(ledger, scale.cells_of(3))
    return ledger


def tracker(ledger: Ledger, said: list[str], kind: type[Tracker] = Tracker) -> Tracker:
    folder = Path(ledger.store.root).parents[2]
    return kind(f"sqlite:///{folder}/mlflow.db", ledger, Claims(ledger.store), artifact_mb=1.0, say=said.append)


def files_of(run: Any) -> dict[str, bytes]:
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_copied_once(ledger: Ledger, uri: str) -> None:
    runs = runs_of_cells(uri, "scale")
    cells = {cell.key: cell for cell in (ledger.read(key) for key in ledger.done())}
    assert Counter(run.data.tags["plumbline.cell_key"] for run in runs) == dict.fromkeys(cells, 1)
    for run in runs:
        assert run.info.status == "FINISHED"
        key = run.data.tags["plumbline.cell_key"]
        assert files_of(run) == {name: ledger.file(key, name) for name in cells[key].files}


class Slow(Tracker):
    """Its first copy waits until it is told to go on."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.copying, self.go_on = threading.Event(), threading.Event()

    def _copy(self, key: str, unfinished: str, lapses: int) -> str:
        self.copying.set()
        assert self.go_on.wait(60)
        return super()._copy(key, unfinished, lapses)


def held_in_a_copy(ledger: Ledger, said: list[str] | None = None) -> Slow:
    """A tracker that was asked for all cells and whose thread is in its first copy."""
    slow = tracker(ledger, [] if said is None else said, Slow)
    assert isinstance(slow, Slow)
    slow.start({}, {})
    slow.want(ledger.done())
    assert slow.copying.wait(60)
    return slow


def test_texts_with_quotes_are_found_as_they_are(ledger: Ledger) -> None:
    from mlflow.utils.search_utils import SearchUtils

    for text in ("/a b/c_%d", "/o'b", "/o'b/d'e", '/x"y'):
        assert [f["value"] for f in SearchUtils.parse_search_filter(f"tags.x = {_quoted(text)}")] == [text]
    both = Ledger(f"{ledger.store.root}/'\"", "scale", "1")
    with pytest.raises(UserError, match="has both ' and \" in its path"):
        Tracker("sqlite:///x.db", both, Claims(ledger.store), artifact_mb=1.0, say=print)


def test_rows_with_tracked_parameters_are_metrics_and_others_stay_in_the_ledger() -> None:
    none = float("nan")
    rows = pd.DataFrame(
        [
            ("loss", 3.0, 5.0, None, none, none),
            ("loss", 2.0, 10.0, None, none, none),
            ("nll", 1.5, none, "ema", none, none),
            ("nll", 1.25, none, "ema", 2.0, none),
            ("nll", none, none, "raw", none, none),
            ("top1", 0.5, none, None, none, 3.0),
        ],
        columns=["metric", "value", "step", "weights", "codebook", "draw"],
    )
    cell = PublishedCell("key", {}, rows, (), "uri", {})
    loss = [("loss", 3.0, 1500, 5), ("loss", 2.0, 2000, 10)]
    assert list(_points(cell, 1000, 2000, ())) == loss
    with_parameters = [("nll/ema", 1.5, 2000, 0), ("nll/ema/codebook 2", 1.25, 2000, 0)]
    assert list(_points(cell, 1000, 2000, ("weights", "codebook"))) == loss + with_parameters


def test_the_end_does_not_copy_what_the_thread_is_copying(ledger: Ledger) -> None:
    said: list[str] = []
    slow = held_in_a_copy(ledger, said)
    threading.Timer(1.0, slow.go_on.set).start()
    assert not slow.finish("FINISHED", {}, [], timeout=0.1)
    assert any("a copy did not end within" in line for line in said)
    assert slow._thread is not None
    slow._thread.join()
    slow.claims.release()
    after = tracker(ledger, said)
    after.start({}, {})
    after.want(ledger.done())
    assert after.finish("FINISHED", {}, [])
    after.claims.release()
    assert_copied_once(ledger, slow.uri)


def test_a_launch_that_leaves_copies_nothing_more(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a database, which takes many seconds to make: the client notes what it is asked."""
    client = MagicMock()
    monkeypatch.setattr(Slow, "_open", lambda self: vars(self).update(_parent="launch", _client=client))
    monkeypatch.setattr(Slow, "_look_up", lambda self, keys: None)
    slow = held_in_a_copy(ledger)
    slow.claims.release()
    threading.Timer(0.2, slow.go_on.set).start()
    slow.leave("KILLED", {}, 60)
    client.create_run.assert_not_called()
    client.set_terminated.assert_called_once_with("launch", "KILLED")
    assert ledger.store.names("_claims/launches") == []


def test_leaving_does_not_wait_for_a_copy(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slow, "_open", lambda self: None)
    monkeypatch.setattr(Slow, "_look_up", lambda self, keys: None)
    slow = held_in_a_copy(ledger)
    slow.leave("KILLED", {}, 0.1)
    assert slow._thread is not None
    assert slow._thread.is_alive()
    slow.go_on.set()
    slow._thread.join()
    slow.claims.release()


def test_a_run_left_without_its_files_gets_them(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tracker(ledger, [])
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "_log_files", lambda *a: (_ for _ in ()).throw(OSError("the network went away")))
        patch.setattr("sweeps._track._FINISH_TRIES", 1)
        broken.start({}, {})
        broken.want(ledger.done())
        assert not broken.finish("FINISHED", {}, [])
        broken.claims.release()
    assert {run.info.status for run in runs_of_cells(broken.uri, "scale")} == {"RUNNING"}
    after = tracker(ledger, [])
    after.start({}, {})
    after.want(ledger.done())
    assert after.finish("FINISHED", {}, [])
    after.claims.release()
    assert_copied_once(ledger, after.uri)


@pytest.mark.parametrize(
    ("sweep", "preset"),
    [
        *[("proxy_gap", "local"), ("codec_lm", "local"), ("codec_lm", "text_local"), ("memory_cache", "local")],
        *[("odor_topology", "audit"), ("odor_topology", "ensemble"), ("odor_topology", "utility")],
    ],
)
def test_names_tell_the_runs_of_a_preset_apart(sweep: str, preset: str) -> None:
    study: Any = importlib.import_module(f"sweeps.{sweep}").SWEEP
    cells = study.plan(study.presets[preset])
    published = [PublishedCell(c.key, c.identity(), pd.DataFrame(), (), "", {}) for c in cells]
    names = Counter(_name(cell, study.named) for cell in published)
    assert max(names.values()) == 1, names.most_common(3)
    assert not names.keys() & {c.key for c in cells}
