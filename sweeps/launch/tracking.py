"""Copy the ledger to MLflow: one parent run per launch and exactly one run per cell, whatever restarts happen.

The ledger is the record and MLflow a copy of it. A thread copies published cells that MLflow lacks, so a tracking
server that is down costs nothing but the copy: the next launch copies what is missing. The times of all points
follow from the published cell alone, so copying twice writes the same rows.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import logging
import os
import re
import shlex
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import filelock
import tenacity

from sweeps.core.cells import PublishedCell, UserError, digest
from sweeps.ledger.claims import Claims
from sweeps.ledger.ledger import Ledger
from sweeps.ledger.logins import http_login, remember, with_login, without_password
from sweeps.ledger.published import file_of, file_sizes

if TYPE_CHECKING:
    from mlflow.entities import Param

_POLL_SECONDS = 0.5  # between looks for newly published cells
_FINISH_TRIES = 4  # of a store that answered before: SQLite may be locked by another launch
_WAIT_SECONDS = 60.0  # for cells that another launch is copying
_BATCH = 1000  # metrics a log_batch call may carry (MLflow REST limit)
_CHUNK = 256  # cells claimed and copied at once: few requests per cell, and other launches get a share
_SINGLE_LOOKUPS = 20  # cells looked up one by one; more are found by one listing
_WRITERS = 8  # threads that copy to a server, since each waits for its answers; SQLite allows one writer
_SAY_SECONDS = 15.0  # between lines of progress while `finish` copies
_PAGE = 5000  # runs a search may return at once
_TAG_LENGTH = 5000  # characters that MLflow takes in a tag
_COMPARE_RUNS = 100  # the compare page slows beyond this
_PLAIN = "/!$&'()*+,;=:@"  # characters of a path that need no percent-encoding in an address
_BUSY = re.compile(r"database is locked|database table is locked")  # SQLite, while another launch writes
# answers that would be the same next time: no permission, the schema of another MLflow
_FINAL = re.compile(r"error code 40[0134]|PERMISSION_DENIED|UNAUTHENTICATED|out-of-date database schema")


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


class Refused(Exception):
    """MLflow refuses, and asking again changes nothing; the text gives the remedy."""


class Tracker:
    """Copies the cells of one ledger into one MLflow experiment; `say` prints a line for the user.

    Raises UserError for a ledger that MLflow's searches cannot name, and nothing after construction: an unreachable
    server is reported once and tried again by `finish` and later launches.
    """

    def __init__(
        self,
        uri: str,
        ledger: Ledger,
        claims: Claims,
        *,
        artifact_mb: float,
        say: Callable[[str], None],
        named: Sequence[str] = (),
        tracked: Sequence[str] = (),
    ) -> None:
        self.uri, self.ledger, self.claims, self.say = remember(uri), ledger, claims, say
        _quoted(ledger.store.uri)
        self._group = f"track-{digest(self.uri)[:8]}"
        self._artifact_bytes = artifact_mb * 2**20
        self._named, self._tracked = tuple(named), tuple(tracked)
        self._wanted: dict[str, None] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._left = threading.Event()  # set by `leave`
        self._thread: threading.Thread | None = None
        self._client: Any = None
        self._address = ""
        self._experiment = ""
        self._parent = ""
        self._down = False
        self._refused = False
        self._ended = False  # `finish` or `leave` was called
        self._many = False  # more cells than are looked up one by one
        self._listed = False  # every run of this ledger's cells that was made before is in `run_ids` or `_begun`
        self._begun: dict[str, str] = {}  # {key: id of a run that a launch left unfinished}
        self._left_out: set[str] = set()  # damaged cells
        self.run_ids: dict[str, str] = {}

    def start(self, parent_params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Open the launch's parent run in a thread that then copies whatever `want` names."""
        self._parent_params, self._parent_tags = dict(parent_params), dict(tags)
        self._many = int(parent_params.get("cells", 0)) > _SINGLE_LOOKUPS
        with contextlib.suppress(ImportError):  # MLflow imports it in the thread; Matplotlib fails on one half loaded
            importlib.import_module("IPython")
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def want(self, keys: Iterable[str]) -> None:
        """Add published cells to those that are copied."""
        with self._lock:
            self._wanted.update(dict.fromkeys(k for k in keys if k not in self.run_ids))

    def finish(self, status: str, metrics: Mapping[str, float], files: Sequence[Path], timeout: float = 600.0) -> bool:
        """Copy what is left, close the parent run with its summary and report files; False if MLflow is unreachable."""
        self._stop.set()
        self._ended = True
        if self._thread:
            self._thread.join(timeout)
            if self._thread.is_alive():  # copying here as well would make two runs of the cells it is at
                self._unreachable(TimeoutError(f"a copy did not end within {timeout:.0f} s"))
                return False
        if self._refused:
            return False
        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._worth_another_try),
            stop=tenacity.stop_after_attempt(_FINISH_TRIES),
            wait=tenacity.wait_random_exponential(multiplier=1, max=10),
            reraise=True,
        )
        try:
            again(self._finish_once, status, metrics, files)
        except Exception as error:
            self._unreachable(error)
            return False
        return not self._wanted

    def _worth_another_try(self, error: BaseException) -> bool:
        """Whether a store that answered before may answer again: not a file, unless another launch is writing to it."""
        if isinstance(error, Refused) or _FINAL.search(str(error)) or not isinstance(error, Exception):
            return False
        if sqlite_file(self.uri) is not None or self.uri.startswith("file:") or "://" not in self.uri:
            return bool(_BUSY.search(str(error)))
        return bool(self._parent)

    def _finish_once(self, status: str, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
        self._open()
        end = time.monotonic() + _WAIT_SECONDS
        said, total = time.monotonic(), len(self._wanted)
        while self._wanted and time.monotonic() < end:
            if self._drain():
                end = time.monotonic() + _WAIT_SECONDS
            else:  # another live launch is copying these
                time.sleep(_POLL_SECONDS)
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                self.say(
                    f"MLflow: {total - len(self._wanted)} of {total} cells copied; the next launch copies the rest"
                )
        self._end_parent(status, metrics, files)

    def _end_parent(self, status: str, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
        now = int(time.time() * 1000)
        self._log_points(self._parent, [(n, v, now, 0) for n, v in metrics.items()])
        for file in files:
            self._client.log_artifact(self._parent, str(file), "report")
        self._client.set_terminated(self._parent, status)

    def leave(self, status: str, metrics: Mapping[str, float], seconds: float) -> None:
        """Copy nothing more and close the parent run, if that works within `seconds`; the next launch does the rest.

        Does nothing after `finish` or `leave`.
        """
        if self._ended:
            return
        self._ended = True
        self._left.set()
        self._stop.set()
        if self._refused or (self._down and not self._parent):  # no run to close, and none can be made
            return

        def close() -> None:
            if self._thread:
                self._thread.join()
            if self._parent:
                with contextlib.suppress(Exception):
                    self._end_parent(status, metrics, ())

        closing = threading.Thread(target=close, name="mlflow-end", daemon=True)
        closing.start()
        closing.join(seconds)

    def _work(self) -> None:
        while True:
            stopping = self._stop.is_set()
            try:
                self._open()
                while self._drain() and not self._stop.is_set():
                    pass
            except Exception as error:
                self._unreachable(error)
                if self._refused:
                    return
                self._stop.wait(10.0)
            if stopping or self._stop.wait(_POLL_SECONDS):
                return

    def _unreachable(self, error: Exception) -> None:
        """Report once what is wrong with the store, and whether repeating the command is the remedy."""
        text = without_password(str(error))  # libraries print the address with its password
        self._refused = self._refused or isinstance(error, Refused) or bool(_FINAL.search(text))
        if not self._down:
            reason = text.splitlines()[0] if text else type(error).__name__
            if isinstance(error, Refused):
                self.say(f"MLflow at {self.uri}: {reason}; results are safe in the ledger")
            elif self._refused:
                self.say(
                    f"MLflow at {self.uri} refuses ({reason[:240]}); results are safe in the ledger and the next "
                    "launch after that is repaired copies them"
                )
            else:
                self.say(
                    f"MLflow at {self.uri} does not answer ({reason[:160]}); results are safe in the ledger "
                    "and the next launch copies them"
                )
        self._down = True

    def _open(self) -> None:
        """Connect, end the runs of dead launches, and find or make this launch's run; nothing where that was done."""
        if self._parent:
            return
        self._experiment = self._connect()
        own = self._end_dead_launches()
        self._parent = own or self._make_parent()
        if self._down:
            self.say(f"MLflow at {self.uri} answers again")
            self._down = False

    def _connect(self) -> str:
        """Make the client and return the id of the experiment, which is made where there is none."""
        _quiet_mlflow()
        from mlflow.tracking import MlflowClient

        self._address = with_login(self.uri)
        if login := http_login(self.uri):  # MLflow takes them from here, and no address in an error holds them
            os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = login
            self._address = self.uri
        name, file = f"plumbline/{self.ledger.sweep}", sqlite_file(self.uri)
        with contextlib.nullcontext() if file is None else _alone(file):
            self._client = MlflowClient(self._address)
            found = self._client.get_experiment_by_name(name)
        if found is None:
            artifacts = None if file is None else (file.parent / "mlartifacts").as_uri()
            try:
                return str(self._client.create_experiment(name, artifact_location=artifacts))
            except Exception:  # another launch made it in between
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise Refused(
                f"the experiment {name} is in the trash, so nothing is copied; bring it back with `"
                f"MLFLOW_TRACKING_URI={shlex.quote(self.uri)} mlflow experiments restore --experiment-id "
                f"{found.experiment_id}`, and the same command copies the cells"
            )
        return str(found.experiment_id)

    def _end_dead_launches(self) -> str:
        """Mark open runs of launches that died as KILLED; returns this launch's own open run, empty if it has none."""
        own = ""
        here = f"tags.`plumbline.ledger` = {_quoted(self.ledger.identifier())} and attributes.status = 'RUNNING'"
        for run in self._client.search_runs([self._experiment], here):
            launch = run.data.tags["plumbline.launch"]
            if launch == self.claims.launch_id:
                own = run.info.run_id  # made by a call whose answer was lost
            elif not self.claims.alive(launch):
                self._client.set_terminated(run.info.run_id, "KILLED")
        return own

    def _make_parent(self) -> str:
        """Id of a new run for this launch."""
        launch = self.claims.launch_id
        tags = {
            "plumbline.kind": "launch",
            "plumbline.launch": launch,
            "plumbline.ledger": self.ledger.identifier(),
            **self._parent_tags,
            **{f"setting.{name}": str(value)[:_TAG_LENGTH] for name, value in self._parent_params.items()},
        }
        made = self._client.create_run(self._experiment, run_name=f"launch {launch}", tags=tags)
        return str(made.info.run_id)

    def _tag(self, key: str) -> str:
        """Identifies the run of a cell: the ledger's own name (so that a ledger may be moved), then the cell's key."""
        return f"{self.ledger.identifier()}/{key}"

    def _look_up(self, keys: Sequence[str] | None) -> None:
        """Find the runs that exist for these cells (None: all of this ledger's), finished ones and others."""
        self._look_up_by("plumbline.cell", self._tag(""), keys)
        if self.ledger.had_no_name:  # copied before ledgers had a name of their own: by address
            for uri in self.ledger.store.former_uris():
                self._look_up_by("plumbline.cell_uri", f"{uri}/", keys)

    def _look_up_by(self, tag: str, here: str, keys: Sequence[str] | None) -> None:
        """Runs whose tag is `here` followed by a key."""
        kind = "tags.`plumbline.kind` = 'cell'"
        if keys is None:
            filters = [f"{kind} and tags.`{tag}` LIKE {_quoted(f'{here}%')}"]
        else:
            filters = [f"{kind} and tags.`{tag}` = {_quoted(here + key)}" for key in keys]
        for text in filters:
            token = None
            while True:
                page = self._client.search_runs([self._experiment], text, max_results=_PAGE, page_token=token)
                for run in page:
                    named = run.data.tags[tag]
                    if named.startswith(here):  # LIKE ignores case and takes `_` for any character
                        found = self.run_ids if run.info.status == "FINISHED" else self._begun
                        found[named.removeprefix(here)] = run.info.run_id
                token = page.token
                if not token:
                    break

    def _drain(self) -> bool:
        """Copy a chunk of the wanted cells; False where there are none that no other live launch is copying."""
        with self._lock:
            wanted = list(itertools.islice(self._wanted, _CHUNK))
        if not wanted or self._left.is_set():
            return False
        # claimed first, looked up second: nobody else can make a run for these cells after the look-up
        lapses = self.claims.lapses()
        ours, _ = self.claims.claim(wanted, self._group)
        if self._many and not self._listed:
            self._look_up(None)
            self._listed = True
        elif not self._listed or self.claims.shared(self._group):  # else nobody made a run since the listing
            self._look_up(wanted)
        try:
            self._copy_all([key for key in ours if key not in self.run_ids], lapses)
        except BaseException:
            self._listed = False  # a run may have been made whose id did not arrive
            raise
        finally:
            finished = [key for key in wanted if key in self.run_ids]
            self.claims.done_with(finished, self._group)
            with self._lock:
                for key in wanted:
                    self._wanted.pop(key, None)
                over = self.run_ids.keys() | self._left_out
                self._wanted.update({key: None for key in wanted if key not in over})
        return bool(finished)

    def _copy_all(self, keys: Sequence[str], lapses: int) -> None:
        pool = ThreadPoolExecutor(_WRITERS if sqlite_file(self.uri) is None else 1)
        try:
            copies = {pool.submit(self._copy, key, self._begun.get(key, ""), lapses): key for key in keys}
            for copy in as_completed(copies):
                try:
                    run_id = copy.result()
                except UserError as error:  # the cell's fault, not MLflow's: the others go on
                    self._left_out.add(copies[copy])
                    self.say(f"not copied to MLflow: {error}")
                    continue
                if run_id:
                    self.run_ids[copies[copy]] = run_id
                else:
                    self._listed = False
        finally:
            pool.shutdown(cancel_futures=True)

    def _copy(self, key: str, unfinished: str, lapses: int) -> str:
        """Make the run of a cell, or fill the one that a launch left unfinished; returns its id.

        An empty text where this launch was paused so long (more `lapses` than when it claimed) that another took over,
        and where it is about to end.
        """
        from mlflow.entities import Param, RunTag

        if self._left.is_set():
            return ""
        cell = self.ledger.read(key)
        published = int(cell.meta["published_unix"] * 1000)
        began = published - int(cell.meta.get("pack_seconds", 0.0) * 1000)
        tags = self._cell_tags(cell)
        run_id, place = unfinished, ""
        if not run_id:
            made = self._client.create_run(
                self._experiment, start_time=began, run_name=_name(cell, self._named), tags=tags
            )
            run_id, place = made.info.run_id, made.info.artifact_uri
            away = self.claims.lapses() != lapses or self.claims.overtaken(self._group)
            if away and self._taken_over(key, run_id):
                self._client.delete_run(run_id)
                return ""
        if unfinished:
            self._client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])
        params = [Param(k, str(v)) for k, v in cell.identity.items()]
        self._log_points(run_id, list(_points(cell, began, published, self._tracked)), params)
        self._log_files(run_id, place, cell)
        self._client.set_terminated(run_id, "FINISHED", end_time=published)
        return run_id

    def _cell_tags(self, cell: PublishedCell) -> dict[str, str]:
        """What the run of a cell is found by, where it belongs, and every field of the cell."""
        return {
            "plumbline.kind": "cell",
            "plumbline.cell_key": cell.key,
            "plumbline.cell": self._tag(cell.key),
            "plumbline.cell_uri": f"{self.ledger.store.uri}/{cell.key}",
            "plumbline.version": self.ledger.version,
            "plumbline.launch": str(cell.meta.get("launch", "")),
            "plumbline.git_commit": str(cell.meta.get("git_commit", "")),
            "plumbline.packages": json.dumps(cell.meta.get("packages", {})),
            "plumbline.hardware": str(cell.meta.get("hardware", "")),
            "mlflow.parentRunId": self._parent,
            **{str(k): str(v) for k, v in cell.identity.items()},
        }

    def _taken_over(self, key: str, run_id: str) -> bool:
        """Whether another launch copies the cell, or has made a run of it besides this one."""
        if not self.claims.claim([key], self._group)[0]:
            return True
        place = f"tags.`plumbline.cell` = {_quoted(self._tag(key))}"
        return any(run.info.run_id != run_id for run in self._client.search_runs([self._experiment], place))

    def _log_points(
        self, run_id: str, points: Sequence[tuple[str, float, int, int]], params: Sequence[Param] = ()
    ) -> None:
        from mlflow.entities import Metric

        first = _BATCH - len(params)  # a call carries so many entries in all
        rest = [points[i : i + _BATCH] for i in range(first, len(points), _BATCH)]
        for i, part in enumerate([points[:first], *rest]):
            metrics = [Metric(*point) for point in part]
            self._client.log_batch(run_id, metrics=metrics, params=() if i else params)

    def _log_files(self, run_id: str, place: str, cell: PublishedCell) -> None:
        """Copy the cell's files to the run's artifacts at `place`, the address that MLflow gave (empty: not known)."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        left_out = []
        with tempfile.TemporaryDirectory() as folder:
            sizes = file_sizes(cell.meta)
            for name in cell.files:
                if sizes.get(name, 0) > self._artifact_bytes:
                    left_out.append(name)
                    continue
                copy = Path(folder, name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file_of(cell, name))
            if left_out:
                text = "".join(f"{cell.uri}/{name}\n" for name in left_out)
                Path(folder, "larger_files_in_ledger.txt").write_text(text, encoding="utf-8")
            if place:  # the client would request the whole run first, only to learn the same address
                get_artifact_repository(place, tracking_uri=self._address).log_artifacts(folder)
            else:
                self._client.log_artifacts(run_id, folder)

    def runs_link(self) -> str:
        """Short address that opens MLflow on the runs of this launch; empty where MLflow was never reached.

        The host is that of `make ui` where the store is a file.
        """
        if not self._experiment:
            return ""
        search = quote(f"tags.`plumbline.launch` = {_quoted(self.claims.launch_id)}", safe="")
        return f"{self._base}/#/experiments/{self._experiment}/runs?searchFilter={search}"

    @property
    def _base(self) -> str:
        """Address of MLflow's pages."""
        return self.uri.rstrip("/") if self.uri.startswith("http") else "http://127.0.0.1:5000"

    def compare_link(self, keys: Sequence[str]) -> str:
        """Address of MLflow's compare page for the runs of these cells (the first hundred)."""
        runs = [self.run_ids[k] for k in keys if k in self.run_ids][:_COMPARE_RUNS]
        experiments = quote(json.dumps([self._experiment]))
        return f"{self._base}/#/compare-runs?runs={quote(json.dumps(runs))}&experiments={experiments}"


def _quiet_mlflow() -> None:
    """Have MLflow give up soon on a server that is unreachable, and print no lines of its own."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _alone(file: Path) -> contextlib.AbstractContextManager[Any]:
    """A lock for the first call on a SQLite file, which makes its tables: two launches doing so at once break them.

    Raises sqlite3.Error where the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file.parent / "mlflow.db.lock")
    _open_once(file)
    return lock


def _open_once(file: Path) -> None:
    """Open and lock a SQLite file for writing; raises sqlite3.Error.

    MLflow asks ten times with growing pauses, nearly two minutes in all, whatever is wrong with a file.
    """
    with contextlib.closing(sqlite3.connect(file, timeout=60.0, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        database.execute("ROLLBACK")


def _quoted(text: str) -> str:
    """A text as MLflow's search filters take it; raises UserError for one with both kinds of quotes."""
    if "'" not in text:
        return f"'{text}'"
    if '"' in text:
        raise UserError(f"storage {text} has both ' and \" in its path, which MLflow cannot search; choose one without")
    return f'"{text}"'


def _name(cell: PublishedCell, named: Sequence[str]) -> str:
    """`pythia-70m mid layer=3 k=8 seed=0 tokens=10000000`: texts bare, all else with the field's name."""
    shown = {name: cell.identity[name] for name in named if name in cell.identity}
    bare = {name for name, value in shown.items() if isinstance(value, str)} - {"text"}
    return " ".join(str(v) if name in bare else f"{name}={v}" for name, v in shown.items()) or cell.key


def _points(
    cell: PublishedCell, began: int, published: int, tracked: Sequence[str]
) -> Iterable[tuple[str, float, int, int]]:
    """(name, value, time in ms, step): rows with a `step` are curves; `codebook_nll/ema/codebook 2` has `tracked` ones.

    Rows with other parameters stay in the ledger.

    A curve's points are spread evenly over the pack's time, since rows do not record it: MLflow's pages open on
    time as the x axis, where points of one moment would lie on one vertical line.
    """
    rows = cell.rows
    last = max(1.0, float(rows["step"].max())) if "step" in rows.columns and rows["step"].notna().any() else 1.0
    parameters = [c for c in rows.columns if c not in ("metric", "value", "unit", "step")]
    shown = set(tracked)
    for record in rows.to_dict("records"):
        given = {p: record[p] for p in parameters if record[p] is not None and record[p] == record[p]}
        if not given.keys() <= shown or record["value"] != record["value"]:
            continue
        values = {p: v if isinstance(v, str) else f"{p} {v:g}" for p, v in given.items()}
        name = "/".join([record["metric"], *(values[p] for p in tracked if p in values)])
        step = record.get("step")
        if step is None or step != step:
            yield name, record["value"], published, 0
        else:
            yield name, record["value"], int(began + (published - began) * step / last), int(step)
