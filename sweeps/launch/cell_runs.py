"""The runs of a ledger's cells in MLflow: found, begun, followed, filled; what they say.

A run has under plain names what the ledger holds of its cell and nothing else; `live/NAME` and `system/NAME` are what
was seen while the cell was computed, with the times at which it was seen. The times of all other points follow from
the published cell alone, so copying twice writes the same rows.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeps.core.cells import Cell, PublishedCell, digest
from sweeps.launch.live import Live, Point
from sweeps.launch.mlflow_store import GRID, LAUNCH, TAG_LENGTH, quoted
from sweeps.ledger.claims import Claims
from sweeps.ledger.ledger import Ledger
from sweeps.ledger.logins import remember, without_password
from sweeps.ledger.published import file_of, file_sizes

if TYPE_CHECKING:
    from mlflow.entities import Param, RunTag

_BATCH = 1000  # entries a log_batch call may carry (MLflow REST limit)
_PAGE = 5000  # runs a search may return at once
_ERROR = "plumbline.error"


@dataclass(frozen=True)
class Run:
    """A run of a cell. place: the address of its artifacts, empty where it is not known. grids: see GRID."""

    id: str
    place: str = ""
    status: str = "RUNNING"
    grids: str = ""

    @property
    def finished(self) -> bool:
        return self.status == "FINISHED"

    @staticmethod
    def of(run: Any) -> Run:
        """From MLflow's own."""
        return Run(run.info.run_id, run.info.artifact_uri or "", run.info.status, run.data.tags.get(GRID, ""))


def run_name(key: str, identity: Mapping[str, Any], named: Sequence[str]) -> str:
    """`pythia-70m mid layer=3 k=8 seed=0 tokens=10000000`: texts bare, all else with the field's name."""
    shown = {name: identity[name] for name in named if name in identity}
    bare = {name for name, value in shown.items() if isinstance(value, str)} - {"text"}
    return " ".join(str(v) if name in bare else f"{name}={v}" for name, v in shown.items()) or key


def points(
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


class CellRuns:
    """One run per cell, whatever launches make, follow and fill it; the base of the `Tracker`, which says when.

    Every method that changes a run is called for cells that this launch has claimed in the group of its MLflow.
    """

    def __init__(
        self,
        uri: str,
        ledger: Ledger,
        claims: Claims,
        *,
        artifact_mb: float,
        named: Sequence[str] = (),
        tracked: Sequence[str] = (),
    ) -> None:
        self.uri, self.ledger, self.claims = remember(uri), ledger, claims
        self._group = f"track-{digest(self.uri)[:8]}"
        self._artifact_bytes = artifact_mb * 2**20
        self._named, self._tracked = tuple(named), tuple(tracked)
        self._client: Any = None
        self._address = ""
        self._experiment = ""
        self._parent = ""
        self._grid = ""
        self._cells: Mapping[str, Cell] = {}
        self._many = False  # more cells than are looked up one by one
        self._listed = False  # every run of this ledger's cells that was made before is in `_finished` or `_begun`
        self._finished: dict[str, Run] = {}
        self._begun: dict[str, Run] = {}  # runs that are not finished, by whatever launch
        self._followed: dict[str, Run] = {}  # of cells that this launch computes
        self._followed_since = 0  # the lapses of the lease when the first of them was claimed
        self.live = Live()

    @property
    def run_ids(self) -> dict[str, str]:
        """{key: id} of the finished runs that are known."""
        return {key: run.id for key, run in self._finished.items()}

    def _claimed(self, keys: Sequence[str]) -> list[str]:
        """Those of the cells that no other launch copies; whatever run they have is known afterwards.

        Claimed first, looked up second: nobody else can make a run for these cells after the look-up.
        """
        ours, _ = self.claims.claim(keys, self._group)
        if self._many and not self._listed:
            self._look_up(None)
            self._listed = True
        elif not self._listed or self.claims.shared(self._group):  # else nobody made a run since the listing
            self._look_up(keys)
        return ours

    def _tag(self, key: str) -> str:
        """Identifies the run of a cell: the ledger's own name (so that a ledger may be moved), then the cell's key."""
        return f"{self.ledger.identifier()}/{key}"

    def _search(self, text: str) -> Iterator[Any]:
        """All runs of the experiment that a filter finds."""
        token = None
        while True:
            page = self._client.search_runs([self._experiment], text, max_results=_PAGE, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

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
            filters = [f"{kind} and tags.`{tag}` LIKE {quoted(f'{here}%')}"]
        else:
            filters = [f"{kind} and tags.`{tag}` = {quoted(here + key)}" for key in keys]
        for text in filters:
            for run in self._search(text):
                named = run.data.tags[tag]
                if named.startswith(here):  # LIKE ignores case and takes `_` for any character
                    self._know(named.removeprefix(here), Run.of(run))

    def _know(self, key: str, run: Run) -> None:
        (self._finished if run.finished else self._begun)[key] = run

    def _kill_deserted(self) -> None:
        """Mark as KILLED the runs of cells whose launch died; who computes such a cell again continues its run."""
        here = self._tag("")
        running = f"tags.`plumbline.kind` = 'cell' and tags.`plumbline.cell` LIKE {quoted(f'{here}%')}"
        for run in self._search(f"{running} and attributes.status = 'RUNNING'"):
            launch, named = run.data.tags.get(LAUNCH, ""), run.data.tags["plumbline.cell"]
            if named.startswith(here) and launch != self.claims.launch_id and not self.claims.alive(launch):
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _make(self, key: str, identity: Mapping[str, Any], tags: Mapping[str, str], start: int, lapses: int) -> Run:
        """A new run of a cell; one without id where another launch has taken over since this one's claim.

        That takes a pause of this launch that is longer than its lease: then `claims.lapses()` exceeds `lapses`.
        """
        name = run_name(key, identity, self._named)
        made = Run.of(self._client.create_run(self._experiment, start_time=start, run_name=name, tags=tags))
        away = self.claims.lapses() != lapses or self.claims.overtaken(self._group)
        if away and self._taken_over(key, made.id):
            self._client.delete_run(made.id)
            return Run("")
        return made

    def _taken_over(self, key: str, run_id: str) -> bool:
        """Whether another launch copies the cell, or has made a run of it besides this one."""
        if not self.claims.claim([key], self._group)[0]:
            return True
        place = f"tags.`plumbline.cell` = {quoted(self._tag(key))}"
        return any(run.info.run_id != run_id for run in self._client.search_runs([self._experiment], place))

    def _begin(self, key: str, lapses: int) -> Run:
        """The cell's run, open and with the cell's fields; without id where another launch has taken over."""
        identity = self._cells[key].identity()
        known = self._begun.get(key)
        tags = self._tags(key, identity, self.claims.launch_id, known)
        if known is None:
            run = self._make(key, identity, tags, int(time.time() * 1000), lapses)
            if not run.id:
                return run
            tags = {}
        else:
            run = replace(known, status="RUNNING")
            self._reopen(known)
        self._begun[key] = run
        self._log(run.id, [], _params(identity), tags)
        return run

    def _reopen(self, run: Run) -> None:
        if run.status != "RUNNING":
            self._client.update_run(run.id, status="RUNNING")
        if run.status == "FAILED":
            self._client.delete_tag(run.id, _ERROR)

    def _give_up(self, key: str, line: str, lapses: int) -> None:
        """End the cell's run as FAILED, with the reason as a tag."""
        known = self._begun.get(key)
        if known is not None and known.status == "FAILED":
            return
        run = self._begin(key, lapses)
        if run.id:
            self._client.set_tag(run.id, _ERROR, without_password(line)[:TAG_LENGTH])
            self._client.set_terminated(run.id, "FAILED")
            self._begun[key] = replace(run, status="FAILED")

    def _still_followed(self) -> None:
        """Follow no cell any longer that another launch took while this one was paused."""
        if (lapses := self.claims.lapses()) != self._followed_since:
            ours = set(self._claimed(list(self._followed)))
            for key in self._followed.keys() - ours:
                self._begun.pop(key, None)
                del self._followed[key]
            self._followed_since = lapses

    def _log_live(self) -> None:
        """Write the points that wait for the runs that are followed; what fails is dropped and raised."""
        for key, points in self.live.points_of(self._followed).items():
            try:
                self._log(self._followed[key].id, _entries(points))
            except Exception:
                self.live.dropped += len(points)
                raise

    def _end_followed(self) -> None:
        """End the runs of cells that this launch began and does not finish."""
        for key, run in self._followed.items():
            if key not in self._finished and self._begun.get(key, run).status == "RUNNING":
                info = self._client.get_run(run.id)
                if info.info.status == "RUNNING" and info.data.tags.get(LAUNCH) == self.claims.launch_id:
                    self._client.set_terminated(run.id, "KILLED")
        self._followed.clear()

    def _fill(self, key: str, known: Run | None, lapses: int) -> Run:
        """Make the run of a published cell, or fill the one that was begun; returns it, finished.

        Without id where this launch was paused so long that another took over.
        """
        cell = self.ledger.read(key)
        published = int(cell.meta["published_unix"] * 1000)
        began = published - int(cell.meta.get("pack_seconds", 0.0) * 1000)
        tags = self._final_tags(cell, known)
        if known is None:
            run = self._make(key, cell.identity, tags, began, lapses)
            if not run.id:
                return run
            tags = {}
        else:
            run = known
            if run.status == "FAILED":
                self._client.delete_tag(run.id, _ERROR)
        live = self.live.points_of([key]).get(key, [])
        numbers = [*points(cell, began, published, self._tracked), *_entries(live)]
        self._log(run.id, numbers, _params(cell.identity), tags)
        self._log_files(run, cell)
        self._client.set_terminated(run.id, "FINISHED", end_time=published)
        return replace(run, status="FINISHED", grids=self._grids(known))

    def _grids(self, known: Run | None) -> str:
        """The grids of a cell, with this launch's."""
        grids = known.grids.split() if known else []
        return " ".join(dict.fromkeys([*grids, self._grid] if self._grid else grids))

    def _tags(self, key: str, identity: Mapping[str, Any], launch: str, known: Run | None) -> dict[str, str]:
        """What the run of a cell is found by, where it belongs, and every field of the cell."""
        return {
            "plumbline.kind": "cell",
            "plumbline.cell_key": key,
            "plumbline.cell": self._tag(key),
            "plumbline.cell_uri": f"{self.ledger.store.uri}/{key}",
            "plumbline.version": self.ledger.version,
            LAUNCH: launch,
            GRID: self._grids(known),
            "mlflow.parentRunId": self._parent,
            **{str(k): str(v) for k, v in identity.items()},
        }

    def _final_tags(self, cell: PublishedCell, known: Run | None) -> dict[str, str]:
        return self._tags(cell.key, cell.identity, str(cell.meta.get("launch", "")), known) | {
            "plumbline.git_commit": str(cell.meta.get("git_commit", "")),
            "plumbline.packages": json.dumps(cell.meta.get("packages", {})),
            "plumbline.hardware": str(cell.meta.get("hardware", "")),
        }

    def _join_grid(self, keys: Iterable[str]) -> None:
        """Mark finished runs that other grids made as belonging to this launch's grid, too."""
        for key in keys:
            run = self._finished[key]
            if (grids := self._grids(run)) != run.grids:
                self._client.set_tag(run.id, GRID, grids[-TAG_LENGTH:])
                self._finished[key] = replace(run, grids=grids)

    def _log(
        self,
        run_id: str,
        entries: Sequence[tuple[str, float, int, int]],
        params: Sequence[Param] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Write (name, value, time in ms, step) entries, params and tags, in as few calls as there may be."""
        from mlflow.entities import Metric

        first = _BATCH - len(params) - len(tags or {})  # a call carries so many entries in all
        rest = [entries[i : i + _BATCH] for i in range(first, len(entries), _BATCH)]
        for i, part in enumerate([entries[:first], *rest]):
            metrics = [Metric(*entry) for entry in part]
            some = {} if i else {"params": params, "tags": _run_tags(tags or {})}
            self._client.log_batch(run_id, metrics=metrics, **some)

    def _log_files(self, run: Run, cell: PublishedCell) -> None:
        """Copy the cell's files to the run's artifacts."""
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
            if run.place:  # the client would request the whole run first, only to learn the same address
                get_artifact_repository(run.place, tracking_uri=self._address).log_artifacts(folder)
            else:
                self._client.log_artifacts(run.id, folder)


def _params(identity: Mapping[str, Any]) -> list[Param]:
    from mlflow.entities import Param

    return [Param(name, str(value)) for name, value in identity.items()]


def _run_tags(tags: Mapping[str, str]) -> list[RunTag]:
    from mlflow.entities import RunTag

    return [RunTag(name, value) for name, value in tags.items()]


def _entries(points: Iterable[Point]) -> list[tuple[str, float, int, int]]:
    return [(p.name, p.value, p.unix_ms, p.step) for p in points]
