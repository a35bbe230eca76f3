"""Where MLflow keeps its runs: the store's address, the first call on a file, the texts that its searches take."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

import filelock

from sweeps.core.cells import UserError
from sweeps.core.machine import user_cache

TAG_LENGTH = 5000  # characters that every store of MLflow takes in a tag
GRID = "plumbline.grid"  # tag: the grids that a run belongs to, blanks between them
LAUNCH = "plumbline.launch"  # tag: the launch that a run is of
PATIENCE = 60.0  # seconds for another process that writes to a SQLite file; one that takes longer is stopped
_PLAIN = "/!$&'()*+,;=:@"  # characters of a path that need no percent-encoding in an address


def default_uri() -> str:
    """The tracking store used when none is named: a SQLite file under runs/."""
    return _sqlite_uri(Path("runs/mlflow.db"))


def normal_uri(uri: str) -> str:
    """The address; a SQLite file's path is made absolute, since MLflow keeps no artifacts next to a relative one."""
    file = sqlite_file(uri)
    if file is None or (file.is_absolute() and "%" not in uri):
        return uri
    options = uri.partition("?")[2]
    return _sqlite_uri(file) + (f"?{options}" if options else "")


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store, percent-encoding undone as SQLAlchemy does it; None for another kind of store."""
    found = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", uri)
    return Path(unquote(found[1])) if found else None


def _sqlite_uri(file: Path) -> str:
    """The address of a SQLite file. A path alone will not do: `?` would end it, and `%20` would be a blank.

    With the driver named where anything is encoded: for `sqlite:///` MLflow makes the folder that the encoded path is.
    """
    path = str(file.parent.resolve() / file.name)
    encoded = quote(path, safe=_PLAIN)
    return f"sqlite:///{path}" if encoded == path else f"sqlite+pysqlite:///{encoded}"


def quiet_mlflow() -> None:
    """Have MLflow give up soon on a server that is unreachable, and print no lines of its own."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # its import would set its own
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def alone(file: Path, patience: float = PATIENCE) -> Iterator[None]:
    """A lock for the first call on a SQLite file, which makes its tables: two launches doing so at once break them.

    MLflow makes them once per machine, in fifty migrations; a new file gets a copy of them from the user's cache.
    patience: seconds to wait for another process that writes. Raises sqlite3.Error where the file cannot be written,
    filelock.Timeout where another process makes its tables for longer than that.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    _open_once(file, patience)
    with filelock.FileLock(file.parent / "mlflow.db.lock", timeout=patience):
        new = _empty(file)
        if new:
            with contextlib.suppress(sqlite3.Error, OSError, UserError):  # MLflow then makes the tables itself
                _copy_tables(_kept_tables(), file)
        made = new and _empty(file)
        yield
        if made:
            with contextlib.suppress(sqlite3.Error, OSError, UserError):
                _keep_tables(file, _kept_tables())


def _kept_tables() -> Path:
    """Where this machine keeps the tables of the MLflow that is installed, without runs."""
    return user_cache() / "mlflow" / f"tables-{importlib.metadata.version('mlflow')}.db"


def _empty(file: Path) -> bool:
    with contextlib.closing(sqlite3.connect(file, timeout=PATIENCE)) as database:
        return not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]


def _copy_tables(source: Path, target: Path) -> None:
    """Copy a database into another file's place, all of it or nothing."""
    with (
        contextlib.closing(sqlite3.connect(f"file:{quote(str(source))}?mode=ro", uri=True)) as kept,
        contextlib.closing(sqlite3.connect(target, timeout=PATIENCE)) as database,
    ):
        kept.backup(database)


def _keep_tables(file: Path, kept: Path) -> None:
    """Keep the tables that MLflow just made in `file`, unless they hold more than its default experiment."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        copy = Path(folder, kept.name)
        _copy_tables(file, copy)
        with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as database:
            database.execute("DELETE FROM experiments WHERE experiment_id = 0")  # MLflow makes it where it is missing
            tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            filled = {
                name for name in tables if database.execute(f'SELECT EXISTS (SELECT * FROM "{name}")').fetchone()[0]
            }
        if filled <= {"alembic_version", "workspaces"}:
            copy.replace(kept)


def _open_once(file: Path, patience: float) -> None:
    """Open and lock a SQLite file for writing; raises sqlite3.Error.

    MLflow asks ten times with growing pauses, nearly two minutes in all, whatever is wrong with a file.
    """
    with contextlib.closing(sqlite3.connect(file, timeout=patience, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        database.execute("ROLLBACK")


def quoted(text: str) -> str:
    """A text as MLflow's search filters take it; raises UserError for one with both kinds of quotes."""
    if "'" not in text:
        return f"'{text}'"
    if '"' in text:
        raise UserError(f"storage {text} has both ' and \" in its path, which MLflow cannot search; choose one without")
    return f'"{text}"'


def pages(uri: str) -> str:
    """Address of MLflow's pages: the server's own, or that of `make ui` where the store is a file."""
    return uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
