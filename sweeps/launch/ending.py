"""The last lines of a launch: what failed and why, where the results are, and what one would type next."""

from __future__ import annotations

import shlex
import shutil
import sys
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path

from sweeps.core.cells import Cell, described, varying
from sweeps.core.machine import ROOT
from sweeps.launch.lines import LABEL, Whole, labelled
from sweeps.launch.mlflow_store import sqlite_file
from sweeps.ledger.logins import without_password

_NAMED = 3  # cells that are named of those that failed for one reason
_PORT = 5000


def failure_lines(cells: Mapping[str, Cell], reasons: Mapping[str, str]) -> list[str]:
    """The cells that failed, by reason: each reason once, with the first cells that it ended.

    cells: {key: cell} of all planned ones; reasons: {key: reason in one line} of those that failed.
    """
    if not reasons:
        return []
    names, _ = varying(list(cells.values()))
    by_reason: dict[str, list[str]] = {}
    for key, reason in reasons.items():
        by_reason.setdefault(reason, []).append(f"{key} {described(cells[key], names)}".strip())
    lines = []
    for reason, named in by_reason.items():
        if len(named) == 1:
            lines.append(f"failed       {named[0]}: {reason}")
            continue
        lines.append(f"failed       {len(named)} cells: {reason}")
        lines += [f"{'':{LABEL}}{name}" for name in named[:_NAMED]]
        if len(named) > _NAMED:
            lines.append(f"{'':{LABEL}}and {len(named) - _NAMED} more; --plan --all lists them")
    return lines


def program() -> str:
    """The Python of this process as one would type it."""
    return _typed("python", Path(sys.executable))


def command_line(script: str, arguments: Sequence[str]) -> str:
    """A sweep's command as one would type it."""
    return shlex.join([program(), _relative(Path(script)), *arguments])


def next_lines(script: str, given: Sequence[str], *, missing: int, failed: int, follow_up: str) -> list[str]:
    """What one would type next; nothing where all is done and the report was opened.

    given: this launch's arguments. missing: cells that are not published; failed: of those, by their own fault.
    follow_up: the preset that asks the same question of real data, empty where there is none.
    """
    plain = [part for part in given if part not in ("--report", "--retry-failed", "--open", "--plan", "--all")]
    if failed:
        again = command_line(script, [*plain, "--retry-failed"])
        return ["next         put right what the reasons name, then", Whole(f"{'':{LABEL}}{again}")]
    if missing:
        return ["next         run the same command to continue", Whole(f"{'':{LABEL}}{command_line(script, plain)}")]
    if follow_up:
        return [Whole(f"next         {command_line(script, ['--preset', follow_up, '--plan'])}")]
    if "--open" in given:
        return []
    return [Whole(f"next         {command_line(script, [*plain, '--report', '--open'])}")]


def server_command(uri: str) -> str:
    """The command that opens MLflow on a store; empty for a server that runs already, or a store of another kind.

    `make ui` where it opens that store: this checkout's `runs/mlflow.db`.
    """
    uri = without_password(uri)
    if uri.startswith(("http://", "https://")) or uri.startswith("databricks"):
        return ""
    file = sqlite_file(uri)
    if file is not None and file.resolve() == ROOT / "runs" / "mlflow.db":
        return "make ui" if Path.cwd() == ROOT else shlex.join(["make", "-C", str(ROOT), "ui"])
    mlflow = _typed("mlflow", Path(sys.executable).with_name("mlflow"))
    server = [mlflow, "server", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(_PORT)]
    return f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {shlex.join(server)}"


def mlflow_lines(uri: str, link: str) -> list[str]:
    """Where MLflow shows this launch's runs, after the command that starts it where it does not run."""
    command = server_command(uri)
    lines = [command, link] if command else [link or without_password(uri)]
    return [Whole(line) for line in labelled("MLflow", filter(None, lines))]


def open_page(page: Path) -> str:
    """Open a report in a browser; returns a line that tells whether there was one."""
    try:
        opened = webbrowser.open(page.resolve().as_uri())
    except (webbrowser.Error, OSError):
        opened = False
    if opened:
        return f"opened       {page}"
    return f"opened       nothing: no browser was found here; copy {page} to where there is one, it is one file"


def _typed(name: str, file: Path) -> str:
    """A program as one would type it: its name where the shell finds this very file under it, else its path."""
    found = shutil.which(name)
    return name if found and Path(found).absolute() == file.absolute() else _relative(file)


def _relative(path: Path) -> str:
    """The path from this folder where it lies below it, else in full."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
