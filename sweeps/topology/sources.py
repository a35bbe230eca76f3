"""Tables and representations of the topology audit, by name.

Shape suffixes: N rows of a table, D columns of a representation.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data import embeddings, molecules, odor_sources
from data._content import file_sha256
from data.point_clouds import CLOUDS
from sweeps.core.cells import UserError, digest, nearest
from sweeps.topology.cells import FILE_PREFIX, member_of

if TYPE_CHECKING:
    import pandas as pd

    from data.molecules import MoleculeTable
    from sweeps.topology.cells import Audit, TopologyCell
CLOUD_ROWS = 300
SPREAD_ROWS = 20_000  # below it one core finishes (5,000 molecules: 0.6 s of bits) before Ray Data has started
BLANK_POLICIES = ("absent", "refuse")
_SHOWN_COLUMNS = 5
_CURATED = "curated_GS_LF_merged_4983.csv"
_BROADER = ("pyrfume_goodscents_molecules.csv", "pyrfume_leffingwell_molecules.csv")
_CLOUD = "cloud:"
_FROM_SOURCES = ("curated", "broader", "nonoverlap")
_UNLABELLED = ("broader", "nonoverlap")
_BUILT_IN = ("embedded", *_FROM_SOURCES)


@dataclass(frozen=True)
class Sources:
    """The tables and representations of one preset; files are looked up when they are first used."""

    preset: Audit

    @functools.cached_property
    def name(self) -> str:
        """The identity of the preset's table, see `table_name`."""
        return table_name(self.preset.table)

    @functools.cached_property
    def place(self) -> str:
        """Where the table lies: its file, the folder of source files, or "" (download, or part of the program).

        Raises UserError for a folder that does not exist, or that the table does not come from.
        """
        table, folder = self.preset.table, self.preset.table_path
        if not folder:
            return "" if table in _BUILT_IN or table.startswith(_CLOUD) else table
        if table not in _FROM_SOURCES:
            raise UserError(
                f"table_path={folder!r} with table={table}: the folder is read for "
                f"{', '.join(_FROM_SOURCES)} alone; choose one of them or leave table_path out"
            )
        if not Path(folder).is_dir():
            raise UserError(f"table_path={folder!r} is no folder; give the one that holds {_CURATED} and the like")
        return folder

    @functools.cached_property
    def embeddings(self) -> dict[str, np.ndarray]:
        """The embeddings given as files, {`file:STEM-HASH`: [N, D]} in the order of the table's rows.

        Named by content: several can share a ledger, and a changed file is another representation. Raises
        UserError for a file that is missing, unreadable or not of this table's rows, and with a point cloud.
        """
        given = self.preset.embedding
        if given and self.is_cloud:
            raise UserError(
                f"embedding={','.join(given)} has no rows of {self.name}; give it together with its --set table"
            )
        return dict(_embedding(path, self.name, self.place) for path in given)

    @property
    def is_cloud(self) -> bool:
        return self.name.startswith(_CLOUD)

    def table(self, name: str) -> MoleculeTable:
        """A table of molecules by its identity."""
        return open_table(name, self.place)

    def training_table(self, name: str) -> MoleculeTable:
        """The table whose labels the members of the own odor model learn that embed the molecules of table `name`."""
        return self.table(trained_on(name))

    def n_rows(self, name: str) -> int:
        """Number of rows of a table or point cloud."""
        return n_rows(name, self.place)

    def borrowed_rows(self, name: str) -> int:
        return borrowed_rows(name, self.place)

    def matrix(self, name: str, representation: str) -> np.ndarray:
        """A representation [N, D] of table `name` that was given as a file or comes from its molecules alone."""
        given = self.embeddings
        return given[representation] if representation in given else matrix(name, representation, self.place)

    def fingerprint(self, cell: TopologyCell) -> str:
        """Digest of the cell and the content of its table, with the labels' values if its numbers depend on them.

        An embedding given as a file is in the cell itself, whose representation names its content.
        """
        content = [cell.identity()]
        if cell.table.startswith(_CLOUD):
            return digest([*content, {"cloud_rows": CLOUD_ROWS}])
        content.append({"rows": _table_digest(cell.table, self.place)})
        of_member = member_of(cell.representation) is not None
        learnt = trained_on(cell.table) if of_member else cell.table
        if learnt != cell.table:
            content.append({"trained_on": _table_digest(learnt, self.place)})
        if cell.kind == "utility" or of_member:
            content.append({"labels": _label_digest(learnt, self.place)})
        return digest(content)

    def invalid_rows(self) -> pd.DataFrame | None:
        """Rows of the source that the table leaves out (`row`, `smiles`, `reason`); None for a point cloud."""
        return None if self.is_cloud else self.table(self.name).invalid

    def check_blanks(self) -> None:
        """Raise UserError for an unknown policy for blank label cells, and for such cells under `refuse`."""
        policy = self.preset.blank_labels
        if policy not in BLANK_POLICIES:
            raise UserError(
                f"blank_labels={policy!r} is not known{nearest(policy, BLANK_POLICIES)}; choose "
                f"{' or '.join(BLANK_POLICIES)}"
            )
        if policy == "refuse" and not self.is_cloud:
            rows = self.table(self.name)
            if rows.blank_labels:
                raise UserError(
                    f"table {self.name} has {_blanks(rows)} among its labels and blank_labels=refuse; fill them in "
                    "with 0 or 1, or let them count as 0 with --set blank_labels=absent"
                )

    def banner(self) -> list[str]:
        """What the numbers stand on, in plain words."""
        lines = []
        if self.name == "embedded":
            lines.append(
                f"table: {self.n_rows(self.name)} common odorants with textbook labels, part of the program: a "
                "STAND-IN for the study's tables; --set table=curated runs on the 4,983-molecule table (downloaded "
                "once, or --set table=PATH)"
            )
        elif not self.is_cloud:
            rows = self.table(self.name)
            lines.append(f"table: {self.name}, {len(rows)} molecules, {_kept_out(rows)}. {rows.note}")
            lines += _label_lines(rows)
        for embedding, x_ND in self.embeddings.items():
            lines.append(f"embedding {embedding}: given as a file, {len(x_ND)} rows of {x_ND.shape[1]} dimensions")
        if self.preset.clouds:
            lines.append(f"known shapes in addition: {', '.join(self.preset.clouds)} ({CLOUD_ROWS} points each)")
        if any(member_of(r) is not None for r in self.preset.representations):
            lines.append(_pom_line(self.name, self.place))
        return lines


def table_name(text: str) -> str:
    """The identity of a table: its own name, or `file:STEM-HASH` for a path (its content, not its place)."""
    if text in _BUILT_IN or (text.startswith(_CLOUD) and text.removeprefix(_CLOUD) in CLOUDS):
        return text
    path = Path(text)
    if not path.is_file():
        known = [*_BUILT_IN, *(f"{_CLOUD}{c}" for c in CLOUDS)]
        raise UserError(
            f"table {text!r} is no file and no known table{nearest(text, known)}; tables: {', '.join(known)}"
        )
    sha = file_sha256(path)
    if sha == odor_sources.SOURCES[_CURATED].sha256:
        return "curated"
    return _file_name(path, sha)


def _file_name(path: Path, sha256: str) -> str:
    return f"{FILE_PREFIX}{path.stem}-{sha256[:12]}"


@functools.lru_cache(maxsize=4)
def open_table(name: str, place: str) -> MoleculeTable:
    """A table of molecules by name; `place` is its file, a folder with the source files, or "" (download)."""
    path = Path(place)
    folder = path if place and path.is_dir() else None
    curated = folder / _CURATED if folder else path if place else None
    parts = [folder / part for part in _BROADER] if folder else []
    try:
        if name == "embedded":
            return molecules.embedded()
        if name == "curated":
            return molecules.curated(curated)
        if name == "broader":
            return molecules.broader(*parts)
        if name == "nonoverlap":
            return molecules.nonoverlap(molecules.broader(*parts), molecules.curated(curated)).table
        return molecules.read_table(path, name)
    except (ConnectionError, ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


def n_rows(name: str, place: str) -> int:
    """Number of rows of a table."""
    return CLOUD_ROWS if name.startswith(_CLOUD) else len(open_table(name, place))


def trained_on(table: str) -> str:
    """The table whose labels the members of the own odor model learn that embed a table's molecules."""
    return "curated" if table in _UNLABELLED else table


@functools.cache
def borrowed_rows(table: str, place: str) -> int:
    """How many molecules of a table without labels are in the one that its members learn from, stereo left out."""
    return int(
        molecules.found_among(open_table(table, place).smiles, open_table(trained_on(table), place).smiles).sum()
    )


@functools.lru_cache(maxsize=16)
def _embedding(path: str, table: str, place: str) -> tuple[str, np.ndarray]:
    rows = open_table(table, place)
    try:
        x_ND = embeddings.load_aligned(path, rows.ids, rows.frame["row"].tolist(), rows.invalid)
        return _file_name(Path(path), embeddings.content_sha256(path)), x_ND
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


@functools.lru_cache(maxsize=8)
def matrix(table: str, representation: str, place: str) -> np.ndarray:
    """The representation [N, D] of every row of a table that comes from its molecules (others: `run`)."""
    if table.startswith(_CLOUD):
        return CLOUDS[table.removeprefix(_CLOUD)].sample(CLOUD_ROWS, 0)
    rows = open_table(table, place)
    if representation in molecules.FEATURES:
        return _features(rows.smiles, representation)
    from models.odor import bottleneck

    method, _, seed = representation.partition("_")
    return bottleneck.METHODS[method](_features(rows.smiles, "bits_r4"), seed=int(seed or 0))


def _features(smiles: list[str], what: str) -> np.ndarray:
    """Features of a table: computed here, or by Ray Data on the cluster if the table is large enough to gain by it."""
    ray = sys.modules.get("ray")
    spread = len(smiles) >= SPREAD_ROWS and ray is not None and ray.is_initialized()
    return np.asarray(molecules.featurise(smiles, what, ray=spread))


@functools.cache
def _table_digest(name: str, place: str) -> str:
    rows = open_table(name, place)
    return digest([rows.smiles, list(rows.labels)])


@functools.cache
def _label_digest(name: str, place: str) -> str:
    rows = open_table(name, place)
    return digest(rows.frame[list(rows.labels)].to_numpy(np.uint8).tobytes().hex())


def _pom_line(table: str, place: str) -> str:
    learnt = trained_on(table)
    line = "POM: own message-passing odor model trained here on "
    if learnt == table:
        return f"{line}the table's labels; not OpenPOM"
    known = f"{borrowed_rows(table, place)} of the {n_rows(table, place)} molecules of {table}"
    return (
        f"{line}the labels of the {learnt} table; not OpenPOM. {known} are in that table (stereochemistry, which the "
        "model does not see, left out): where they lie is partly learnt, where the others lie is predicted"
    )


def _kept_out(rows: MoleculeTable) -> str:
    """How many rows a table leaves out, by reason."""
    reasons = rows.invalid["reason"]
    counts = reasons.value_counts(sort=False)
    line = ", ".join(f"{count} kept out ({reason})" for reason, count in counts.items()) or "0 kept out"
    repeats = int((reasons != molecules.UNREADABLE).sum())
    if rows.repeated == len(rows):
        line += "; every molecule stands in several rows, of which the first is kept"
    if rows.other_labels:
        line += f"; {rows.other_labels} of the {repeats} repeats have other labels than the row that is kept"
    return line


def _label_lines(rows: MoleculeTable) -> list[str]:
    """How many label columns a table has, which columns are none and why, and what its blank cells count as."""
    line = f"labels: {len(rows.labels)} columns of 0 and 1"
    if rows.no_labels:
        shown = [f"{column} ({reason})" for column, reason in rows.no_labels[:_SHOWN_COLUMNS]]
        more = len(rows.no_labels) - len(shown)
        line += f"; no labels: {', '.join(shown)}" + (f" and {more} more columns" if more else "")
    lines = [line]
    if rows.blank_labels:
        lines.append(
            f"labels: {_blanks(rows)} count as 0 (blank_labels=absent); --set blank_labels=refuse ends such a launch"
        )
    return lines


def _blanks(rows: MoleculeTable) -> str:
    """Number and places of the blank cells in label columns."""
    shown = [f"{count} in {column}" for column, count in rows.blank_labels[:_SHOWN_COLUMNS]]
    more = len(rows.blank_labels) - len(shown)
    total = sum(count for _, count in rows.blank_labels)
    return f"{total} blank cells ({', '.join(shown)}" + (f" and {more} more columns)" if more else ")")
