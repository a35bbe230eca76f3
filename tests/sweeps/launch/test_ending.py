"""The last lines of a launch and of `--plan`: failures by reason, where MLflow is, what one would type next."""

from __future__ import annotations

import shlex
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from sweeps.core.cells import Cell, Estimate
from sweeps.core.machine import ROOT, Machine
from sweeps.launch import ending
from sweeps.launch.ending import failure_lines, mlflow_lines, next_lines, open_page, server_command
from sweeps.launch.lines import Whole
from sweeps.launch.plan import PlanText
from tests.sweeps.launch.test_launch import Main, main  # noqa: F401

MACHINE = Machine(nodes=1, cpus=2, gpus=0, memory_bytes=2**34, hardware="x")


@dataclass(frozen=True, kw_only=True)
class Point(Cell):
    SWEEP: ClassVar[str] = "points"
    VERSION: ClassVar[str] = "1"
    x: int
    shape: str = "round"


POINTS = {cell.key: cell for cell in (Point(x=x) for x in range(30))}
KEYS = list(POINTS)


def test_failures_are_listed_by_reason_with_the_fields_that_differ() -> None:
    reasons = {key: "x is out of range; choose another" for key in KEYS[:5]} | {KEYS[7]: "its worker died"}
    lines = failure_lines(POINTS, reasons)
    assert lines[0] == "failed       5 cells: x is out of range; choose another"
    assert lines[1:4] == [f"             {KEYS[i]} x={i}" for i in range(3)]
    assert lines[4] == "             and 2 more; --plan --all lists them"
    assert lines[5] == f"failed       {KEYS[7]} x=7: its worker died"
    assert failure_lines(POINTS, {}) == []


@pytest.mark.parametrize(
    ("missing", "failed", "follow_up", "expected"),
    [
        (3, 1, "real", ["--preset", "small", "--retry-failed"]),
        (3, 0, "real", ["--preset", "small"]),
        (0, 0, "real", ["--preset", "real", "--plan"]),
        (0, 0, "", ["--preset", "small", "--report", "--open"]),
    ],
)
def test_the_next_command_is_one_that_can_be_copied(missing: int, failed: int, follow_up: str, expected: list) -> None:
    given = ["--preset", "small", "--retry-failed"]
    lines = next_lines("toy.py", given, missing=missing, failed=failed, follow_up=follow_up)
    assert lines[0].startswith("next         ")
    assert isinstance(lines[-1], Whole)
    assert shlex.split(lines[-1])[-len(expected) :] == expected
    assert shlex.split(lines[-1])[-len(expected) - 1] == "toy.py"


def test_make_ui_is_named_where_it_opens_the_store_that_was_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    own = f"sqlite:///{ROOT}/runs/mlflow.db"
    assert server_command(own) == "make ui"
    other = f"sqlite:///{tmp_path}/runs/mlflow.db"
    command = server_command(other)
    assert shlex.split(command)[-7:] == [
        "server",
        "--backend-store-uri",
        other,
        "--host",
        "127.0.0.1",
        "--port",
        "5000",
    ]
    assert Path(shlex.split(command)[1]).name == "mlflow"
    monkeypatch.chdir(tmp_path)
    assert server_command(own) == f"make -C {shlex.quote(str(ROOT))} ui"
    assert server_command("http://user:secret@host:5000") == ""
    assert "secret" not in server_command("postgresql://user:secret@host/db")
    link = "http://host:5000/#/experiments/1/runs?searchFilter=x"
    assert mlflow_lines("http://host:5000", link) == [f"MLflow       {link}"]
    assert mlflow_lines(own, link)[1] == f"             {link}"


@pytest.mark.parametrize("fault", [None, webbrowser.Error("could not locate runnable browser"), False])
def test_a_missing_browser_is_one_line(fault: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def browse(address: str) -> bool:
        opened.append(address)
        if isinstance(fault, Exception):
            raise fault
        return fault is None

    monkeypatch.setattr(ending.webbrowser, "open", browse)
    page = tmp_path / "report.html"
    line = open_page(page)
    assert opened == [page.as_uri()]
    assert line == f"opened       {page}" if fault is None else "no browser was found here" in line


def plan_of(n: int, **estimate: float) -> PlanText:
    cells = [Point(x=x) for x in range(n)]
    done = {c.key for c in cells[:1]}
    return PlanText(
        cells=cells,
        done=done,
        failed=[c.key for c in cells[1:2]],
        packs=3,
        estimate=Estimate(**estimate),
        machine=MACHINE,  # type: ignore[arg-type]
    )


def test_a_plan_begins_with_its_summary_in_units_that_people_read() -> None:
    assert plan_of(30, flops=1.35e18, seconds=65 * 86400.0).summary() == (
        "summary      29 of 30 cells to do, 1.35 EFLOP, about 65 days on this machine, about 4 hours on one A100 "
        "(assumed, not measured)"
    )
    assert plan_of(30, seconds=100.0).summary() == "summary      29 of 30 cells to do, about 100 s on this machine"
    assert plan_of(1).summary() == "summary      all 1 cells are done"
    assert "FLOPs        1.35 EFLOP" in plan_of(30, flops=1.35e18, seconds=1.0).details()


def test_a_large_grid_is_listed_by_its_ends_unless_all_is_asked_for() -> None:
    lines = plan_of(30).table(every=False)
    assert lines[0] == "  all cells: shape=round"
    assert [line.split("x=")[1] for line in lines if "x=" in line] == [*"01234", *map(str, range(25, 30))]
    assert any("20 more cells; --plan --all lists them" in line for line in lines)
    assert lines[2].split()[1:3] == ["done", "x=0"]
    assert lines[3].split()[1:3] == ["failed", "x=1"]
    assert len(plan_of(30).table(every=True)) == 32
    assert len(plan_of(20).table(every=False)) == 22


def test_plan_and_open_on_the_command_line(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    plan = main("--plan", "--preset", "many")
    assert plan.out.splitlines()[1].startswith("summary      200 of 200 cells to do, about 0 s on this machine")
    assert plan.out.count("to do  ") == 10
    assert main("--plan", "--all", "--preset", "many").out.count("to do  ") == 200
    assert main("--plan", "--open").code == 2
    assert main("--all").err.strip() == "toy: --all lists the cells of a plan; give it together with --plan"
    from toy_sweep import Square

    from sweeps.core.cells import Row
    from sweeps.ledger.ledger import Ledger

    Ledger(str(tmp_path / "runs/ledger"), "toy", "1").publish(Square(n=1), [Row("square", 1.0)], {}, {})
    opened: list[str] = []
    monkeypatch.setattr(ending.webbrowser, "open", lambda address: opened.append(address) or True)
    report = main("--report", "--open", "--set", "n=1")
    assert report.code == 0
    assert opened == [(tmp_path / "runs/reports/toy/small/report.html").as_uri()]
    labels = [line[:13].strip() for line in report.out.splitlines() if line[:1].strip()]
    assert labels[-4:] == ["cells", "sum", "report", "opened"]
