"""A report's folder holds what its own launch wrote: no figure of other settings, and nothing of the user's is lost."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from sweeps.core.cells import Row
from sweeps.launch import command
from sweeps.launch.report_folder import keep_runs, put_in_place, say_runs
from sweeps.ledger.ledger import Ledger
from tests.sweeps.launch.test_launch import Main, main  # noqa: F401 - a fixture


def made(root: Path, **files: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / f"{name}.md").write_text(text, encoding="utf-8")
    return root


def visible(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted(folder.iterdir()) if p.is_file() and p.name[0] != "."}


def test_another_launchs_figures_do_not_stay(tmp_path: Path) -> None:
    place = tmp_path / "reports/toy/small"
    put_in_place(made(tmp_path / "a", report="a", figure="a"), place)
    (place / "notes.txt").write_text("mine")
    files = put_in_place(made(tmp_path / "b", report="b"), place)
    assert [f.name for f in files] == ["report.md"]
    assert visible(place) == {"notes.txt": "mine", "report.md": "b"}
    assert visible(tmp_path / "b") == {"report.md": "b"}  # for MLflow, whatever others do to the place meanwhile
    assert [p.name for p in place.parent.iterdir()] == ["small"]


def test_the_address_of_the_runs_stays_with_the_same_report_alone(tmp_path: Path) -> None:
    before = made(tmp_path / "before", report="# One") / "report.md"
    same, other = (made(tmp_path / text, report=f"# {text}") / "report.md" for text in ("One", "Two"))
    keep_runs(same, before)
    assert same.read_text() == "# One"  # there was none
    for address in ("http://a", "http://b"):
        say_runs(before, address)
    assert before.read_text() == "# One\n\nIn MLflow: [these cells compared](http://b).\n"
    for report in (same, other):
        keep_runs(report, before)
    keep_runs(other, tmp_path / "absent.md")
    assert same.read_text() == before.read_text()
    assert other.read_text() == "# Two"


def test_a_folder_without_a_list_of_its_files_is_moved_aside(tmp_path: Path) -> None:
    place = made(tmp_path / "small", report="old", figure="old")
    put_in_place(made(tmp_path / "a", report="a"), place)
    assert visible(place) == {"report.md": "a"}
    assert visible(tmp_path / "small.before") == {"figure.md": "old", "report.md": "old"}


def test_launches_that_end_together_leave_one_whole_report(tmp_path: Path) -> None:
    place, errors = tmp_path / "reports/small", list[Exception]()
    sources = [made(tmp_path / str(i), report=str(i), **{f"figure{i}": str(i)}) for i in range(4)]

    def put(source: Path) -> None:
        try:
            for _ in range(5):
                put_in_place(source, place)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=put, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = visible(place)
    assert not errors
    assert set(found) == {"report.md", f"figure{found['report.md']}.md"}
    assert os.listdir(place.parent) == ["small"]


def test_a_report_names_its_settings_and_holds_its_own_figures(
    tmp_path: Path,
    main: Main,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from toy_sweep import SWEEP, Square

    ledger = Ledger(str(tmp_path / "runs/ledger"), "toy", "1")
    for n in (1, 2):
        ledger.publish(Square(n=n), [Row("square", n**2)], {}, {"published_unix": 1.7e9})
    plain = type(SWEEP).report
    uploaded: list[list[str]] = []

    def report(self: Any, cells: Any, preset_name: str, preset: Any, out: Path) -> list[str]:
        if len(cells) > 1:
            (out / "pairs.png").write_bytes(b"drawn")
        return plain(self, cells, preset_name, preset, out)

    put = command.put_in_place

    def noted(made: Path, place: Path) -> list[Path]:
        files = put(made, place)
        uploaded.append([f.name for f in files])
        return files

    monkeypatch.setattr(type(SWEEP), "report", report)
    monkeypatch.setattr(command, "put_in_place", noted)
    out = tmp_path / "runs/reports/toy/small"
    for numbers, names in (("1,2", ["pairs.png", "report.html", "report.md"]), ("2", ["report.html", "report.md"])):
        assert main("--report", "--set", f"n={numbers}").code == 0
        assert list(visible(out)) == uploaded[-1] == names
        assert f"`--preset small --set n={numbers}`" in (out / "report.md").read_text()
