"""The screen: what fits, how often it is drawn, when a time is worth printing, and streams that go away."""

from __future__ import annotations

import io
import math
import os
import re
import sys
from collections.abc import Iterator

import pytest
from rich.cells import cell_len

from sweeps.core.units import duration, quantity, span
from sweeps.launch.lines import Screen, interactive, plain, tell, wrapped
from sweeps.launch.screen import LOG_SECONDS, Board, Pace, columns, head_of, shorten

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
LONG = "proxy-gap-pythia-410m-layer12-seeds-0-to-7-tokens-200M"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def board(width: int, *, terminal: bool = True, height: int = 30) -> tuple[Board, io.StringIO, Clock]:
    """A board whose thread is not started: the test calls `tick`."""
    stream = Terminal() if terminal else io.StringIO()
    console = Screen(file=stream, width=width, height=height, highlight=False, legacy_windows=False)
    clock = Clock()
    made = Board("proxy_gap", 24, "CE_rec", console=console, clock=clock)
    return made, stream, clock


@pytest.fixture(autouse=True)
def a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def state(**changes: object) -> dict[str, object]:
    told = {"published": 2, "done": 1.2e6, "total": 4e6, "rate": 51234.0, "best": 0.91234, "phase": "training 12 SAEs"}
    return told | changes


def frame(made: Board) -> list[str]:
    """The lines of the table as the console prints them."""
    with made.console.capture() as caught:
        made.console.print(made._picture())
    return [plain(line) for line in caught.get().splitlines()]


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_the_table_fits_any_width(width: int) -> None:
    made, _, _ = board(width)
    for name in (LONG, "pack1", "名前" * 20):
        made.update(name, state(phase="unpatched model, sequence 1 of 40 " * 3), cells=12)
    lines = frame(made)
    assert len(lines) == 5
    assert max(cell_len(line) for line in lines) <= width
    assert lines[0].startswith("proxy_gap 6/24 cells"[:19])


def test_columns_leave_in_order_and_names_keep_both_ends() -> None:
    made, _, clock = board(120)
    for _ in range(10):
        clock.now += 5
        made.update(LONG, state(done=(clock.now - 1000) * 1e4), cells=12)
    wide = frame(made)
    assert wide[1].split() == ["pack", "cells", "done", "tokens/s", "ETA", "best", "CE_rec", "phase"]
    row = made._packs[LONG].row(LONG, clock.now)
    kept = [columns([row], width, "CE_rec")[0].split() for width in (80, 64, 56, 48, 30)]
    assert [len(names) for names in kept] == sorted((len(names) for names in kept), reverse=True)
    assert "tokens/s" not in kept[1]
    assert kept[-1][0] == "pack"
    assert kept[-1][-1] == "phase"
    first = columns([row], 40, "CE_rec")[1].split()[0]
    assert first.startswith("proxy")
    assert first.endswith("200M")
    assert "…" in first
    assert shorten("abcdefghij", 5) == "ab…ij"
    assert head_of("abcdefghij", 5) == "abcd…"
    assert columns([row | {"best": "", "ETA": ""}], 120, "CE_rec")[0].split() == [
        *("pack", "cells", "done", "tokens/s", "ETA", "phase")
    ]


def test_a_low_screen_shows_running_packs_and_counts_the_others() -> None:
    made, _, _ = board(80, height=8)
    for i in range(9):
        made.update(f"pack{i}", state(), cells=2)
    made.drop("pack0")
    lines = frame(made)
    assert len(lines) <= 8
    assert lines[-1] == "and 4 more packs"
    assert not any(line.startswith("pack0") for line in lines)


def test_redrawn_once_a_second_whatever_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    made, stream, clock = board(80)
    monkeypatch.setattr("threading.Thread.start", lambda thread: None)
    monkeypatch.setattr("threading.Thread.join", lambda thread: None)
    made.open()
    for _ in range(100):  # ten seconds
        clock.now += 0.1
        made.update("pack0", state(), cells=4)
        made.tick()
    drawn = stream.getvalue().count("proxy_gap 2/24 cells")
    assert 9 <= drawn <= 11
    made.close()
    assert stream.getvalue().count("proxy_gap 2/24 cells") <= drawn + 2
    assert "\x1b[?25h" in stream.getvalue()  # the cursor is back


@pytest.mark.parametrize("why", ["no terminal", "TERM=dumb"])
def test_a_log_gets_a_line_a_minute_without_control_characters(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    if why == "TERM=dumb":
        monkeypatch.setenv("TERM", "dumb")
    made, stream, clock = board(80, terminal=why == "TERM=dumb")
    monkeypatch.setattr("threading.Thread.start", lambda thread: None)
    monkeypatch.setattr("threading.Thread.join", lambda thread: None)
    made.open()
    for _ in range(600):
        clock.now += 1
        made.update("pack0", state(), cells=4)
        made.tick()
    made.say("\x1b[31mred\x1b[0m, a \rtrick, \x1b]8;;http://x\x07a link and a name\x07")
    made.close()
    lines = stream.getvalue().splitlines()
    assert len([line for line in lines if "pack0: training" in line]) in (600 // LOG_SECONDS, 600 // LOG_SECONDS + 1)
    assert "red, a trick, a link and a name" in lines
    assert not CONTROL.search(stream.getvalue().replace("\n", ""))


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    made, stream, _ = board(80)
    made.update("pack0", state(), cells=4)
    made.console.print(made._picture())
    assert not re.search(r"\x1b\[[0-9;]*(?:3[0-8]|4[0-8]|9[0-7])m", stream.getvalue())


def test_no_time_before_the_phase_has_a_rate() -> None:
    """A first step that takes a minute (compilation) and an evaluation in between do not enter the rate."""
    pace = Pace()
    steady = {"rate": 1.0, "total": 10_000, "phase": "training 4 SAEs"}
    pace.note(0.0, {"rate": 1.0, "total": 10_000, "done": 0, "phase": "loading"})
    pace.note(60.0, steady | {"done": 100})  # the first step, compilation included
    for second in range(1, 15):
        pace.note(60.0 + second, steady | {"done": 100 + 100 * second})
        assert math.isnan(pace.seconds(60.0 + second))
    pace.note(80.0, steady | {"done": 2100})
    assert pace.seconds(80.0) == pytest.approx(79.0)  # 100 a second
    pace.note(81.0, steady | {"done": 2100, "phase": "evaluating SAE 3 of 12"})
    assert math.isnan(pace.seconds(200.0))
    pace.note(200.0, steady | {"done": 2200, "phase": "training 2 SAEs"})
    for second in range(1, 21):
        pace.note(200.0 + second, steady | {"done": 2200 + 50 * second, "phase": f"training {second % 3} SAEs"})
    assert pace.seconds(220.0) == pytest.approx((10_000 - 3200) / 50)
    pace.note(221.0, steady | {"done": 10_000})
    assert math.isnan(pace.seconds(221.0))  # all counted work is done; what follows has no rate


def test_a_pack_of_several_cells_and_packs_that_wait() -> None:
    made, _, clock = board(120)
    for second in range(0, 31, 5):
        clock.now = 1000.0 + second
        made.update("pack0", {"cell": "a", "done": 10 * second, "total": 600, "rate": 10.0}, cells=3)
    assert made._packs["pack0"].left(clock.now) == pytest.approx(30 + 2 * 60)
    assert math.isnan(made.left())  # 21 cells wait for a pack
    assert "ETA" not in made.line()
    made.cells = 3
    assert made.left() == pytest.approx(150)
    made.cells = 24
    for name in ("pack0", "pack1"):
        made.update(name, {"published": 3}, cells=3)
        made.drop(name)
    clock.now = 1060.0
    assert made.left() == pytest.approx(18 * 60 / 6)
    made.forget()
    assert made.published() == 6
    made.already(6, failed=18)
    assert math.isnan(made.left())  # nothing is left to do
    assert "18 failed" in made.line()


def test_counts_whole_cells_where_a_pack_has_no_rate() -> None:
    """The topology audit: each cell is a phase of its own, and its pack counts cells."""
    pace = Pace()
    for done in range(6):
        pace.note(10.0 * done, {"done": done, "total": 20, "phase": f"{'abcdef'[done]} noise draw 3"})
    assert pace.seconds(50.0) == pytest.approx(150.0)


class Gone(io.StringIO):
    """A stream that nobody reads any more."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), ValueError("I/O operation on closed file"), OSError(28, "No space left on device")]
)
def test_a_stream_that_is_gone_ends_the_drawing_and_not_the_launch(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Gone(error))
    made = Board("proxy_gap", 24, "CE_rec", console=Screen(file=Gone(error), width=80))
    made.open()
    made.update("pack0", state(), cells=4)
    made.say("a line")
    made.tick()
    made.close()
    tell(["the answer"])
    monkeypatch.setattr(sys, "stdout", None)  # closed before the process began: `>&-`
    tell(["the answer"])
    quiet = Board("proxy_gap", 24, "CE_rec")
    quiet.open()
    quiet.close()
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)


def test_a_log_file_that_is_rotated_away(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("log") / "launch.log"
    with file.open("w", encoding="utf-8") as log:
        made = Board("proxy_gap", 24, "CE_rec", console=Screen(file=log, width=80))
        made.tick()
        file.unlink()
        made.say("to a file that has no name any more")
    made.say("to a file that is closed")
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def test_lines_after_the_reader_of_a_pipe_left(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python sweeps/… | head -1`: what follows goes nowhere, and the interpreter's last flush succeeds."""
    reader, writer = pipe
    stream = os.fdopen(os.dup(writer), "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    os.close(reader)
    tell(["one", "two"])
    assert sys.stdout is not stream
    print("three", flush=True)
    stream.close()  # would raise BrokenPipeError


def test_long_lines_are_wrapped_below_their_label_and_addresses_stay_whole() -> None:
    line = "answer       " + "R² and the patched loss point in opposite directions " * 3
    lines = wrapped(line, 80)
    assert all(len(part) <= 80 for part in lines)
    assert all(part.startswith(" " * 13) for part in lines[1:])
    assert " ".join(" ".join(lines).split()) == " ".join(line.split())
    address = "http://127.0.0.1:5000/#/experiments/1/runs?searchFilter=" + "x" * 60
    assert address in wrapped(f"MLflow       {address}", 40)[-1]
    assert wrapped(line, 40)[1].startswith("  ")  # no room for an indent of 13
    assert not wrapped(line, 40)[1].startswith("   ")
    assert not interactive(io.StringIO())


def test_units_are_those_that_people_read() -> None:
    assert [span(s) for s in (65 * 86400, 2.04 * 86400, 5 * 3600, 90, 12.3, 3e9, math.nan)] == [
        *("65 days", "2 days", "5 hours", "90 s", "12 s", "95 years", "?")
    ]
    assert quantity(1.35e18, "FLOP") == "1.35 EFLOP"
    assert [quantity(x) for x in (196608, 12, 2.5e13)] == ["197k", "12", "25T"]
    assert [duration(s) for s in (5, 65, 3725, math.inf)] == ["0:05", "1:05", "1:02:05", "?"]
