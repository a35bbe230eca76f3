"""Tables and representations of the topology audit, by name.

Shape suffixes: N rows of a table, D columns of a representation.
"""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from data import embeddings, molecules, odor_sources
from data.point_clouds import CLOUDS
from sweeps._sweep import UserError, digest, nearest

if TYPE_CHECKING:
    from data.molecules import MoleculeTable
    from sweeps.odor_topology import Audit, TopologyCell

Kind = Literal["bits", "counts", "dense"]
CLOUD_ROWS = 300
SPREAD_ROWS = 20_000  # below it a core is done (5,000 molecules: 0.6 s of bits) before Ray Data has started
_CURATED = "curated_GS_LF_merged_4983.csv"
_BROADER = ("pyrfume_goodscents_molecules.csv", "pyrfume_leffingwell_molecules.csv")
_CLOUD = "cloud:"
_BUILT_IN = ("embedded", "curated", "broader", "nonoverlap")
_MODEL = re.compile(r"^(pom|rp256|ae256)_(\d+)$")
_METRICS: dict[str, tuple[str, ...]] = {
    "bits": ("jaccard",),
    "counts": ("tanimoto",),
    "dense": ("euclidean", "cosine"),
}
METRICS = tuple(metric for own in _METRICS.values() for metric in own)
_FIXED: dict[str, Kind] = {
    "bits_r4": "bits",
    "bits_r2": "bits",
    "counts_r4": "counts",
    "physchem": "dense",
    "pca256": "dense",
    "points": "dense",
    "file": "dense",
}


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
    sha = odor_sources.sha256(path)
    if sha == odor_sources.SOURCES[_CURATED].sha256:
        return "curated"
    return f"file:{path.stem}-{sha[:12]}"


def place_of(preset: Audit) -> str:
    """Where the preset's table lies: the folder of source files, or the table's own path."""
    return preset.table_path or preset.table


@functools.lru_cache(maxsize=4)
def open_table(name: str, place: str) -> MoleculeTable:
    """A table of molecules by name; `place` is its file, a folder with the source files, or neither (download)."""
    path = Path(place)
    folder = path if path.is_dir() else None
    curated = folder / _CURATED if folder else path if path.is_file() else None
    parts = [folder / part for part in _BROADER] if folder else []
    try:
        if name == "embedded":
            return molecules.embedded()
        if name == "curated":
            return molecules.curated(curated)
        if name == "broader":
            return molecules.broader(*parts)
        if name == "nonoverlap":
            apart = molecules.nonoverlap(molecules.broader(*parts), molecules.curated(curated))
            return replace(apart.table, note=apart.note)
        return molecules.read_table(path, name)
    except (ConnectionError, ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


def kind_of(representation: str) -> Kind:
    """bits, counts or dense; raises UserError for an unknown name."""
    if representation in _FIXED:
        return _FIXED[representation]
    if _MODEL.match(representation):
        return "dense"
    known = [*_FIXED, "pom_0", "rp256_0", "ae256_0"]
    raise UserError(
        f"representation {representation!r} is not known{nearest(representation, known)}; choose from "
        "bits_r4, bits_r2, counts_r4, physchem, pom_M, pca256, rp256_M, ae256_M"
    )


def metrics_of(representation: str, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Metrics a representation is audited under: its own, cut down to the asked ones where those apply."""
    own = _METRICS[kind_of(representation)]
    if representation in ("physchem", "points"):
        own = ("euclidean",)
    return tuple(m for m in own if not asked or m in asked)


def n_rows(name: str, place: str) -> int:
    """Number of rows of a table."""
    return CLOUD_ROWS if name.startswith(_CLOUD) else len(open_table(name, place))


def member_of(representation: str) -> int | None:
    """Number of the own odor model's member, for `pom_M`."""
    match = _MODEL.match(representation)
    return int(match[2]) if match and match[1] == "pom" else None


@functools.lru_cache(maxsize=8)
def matrix(table: str, representation: str, place: str, embedding: str) -> np.ndarray:
    """The representation [N, D] of every row of a table, all but the own odor model's (see `_topology_run`)."""
    if table.startswith(_CLOUD):
        return CLOUDS[table.removeprefix(_CLOUD)].sample(CLOUD_ROWS, 0)
    rows = open_table(table, place)
    if representation == "file":
        try:
            return embeddings.load_aligned(embedding, rows.ids, rows.frame["row"].tolist())
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error)) from error
    if representation in molecules.FEATURES:
        return _features(rows.smiles, representation)
    from models import bottleneck

    bits = _features(rows.smiles, "bits_r4")
    if representation == "pca256":
        return bottleneck.pca(bits).embedding_NE
    match = _MODEL.match(representation)
    if match and match[1] == "rp256":
        return bottleneck.random_projection(bits, seed=int(match[2])).embedding_NE
    if match and match[1] == "ae256":
        return bottleneck.autoencoder(bits, seed=int(match[2])).embedding_NE
    raise UserError(f"representation {representation!r} has no matrix of its own")


def _features(smiles: list[str], what: str) -> np.ndarray:
    """Features of a table: here, or by Ray Data over the cluster where the table is large enough to gain by it."""
    ray = sys.modules.get("ray")
    spread = len(smiles) >= SPREAD_ROWS and ray is not None and ray.is_initialized()
    return np.asarray(molecules.featurise(smiles, what, ray=spread))


def fingerprint(cell: TopologyCell, preset: Audit) -> str:
    """Digest of the cell and of the content of its table and external embedding."""
    content = [cell.identity()]
    if cell.table.startswith(_CLOUD):
        content.append({"cloud_rows": CLOUD_ROWS})
    else:
        content.append({"rows": _table_digest(cell.table, place_of(preset))})
    if cell.representation == "file":
        content.append({"embedding": odor_sources.sha256(Path(preset.embedding))})
    return digest(content)


@functools.cache
def _table_digest(name: str, place: str) -> str:
    rows = open_table(name, place)
    return digest([rows.smiles, list(rows.labels)])


def banner(preset: Audit) -> list[str]:
    """What the numbers stand on, in plain words."""
    name = table_name(preset.table)
    lines = []
    if name == "embedded":
        lines.append(
            f"table: {n_rows(name, place_of(preset))} common odorants with textbook labels, part of the program: a "
            "STAND-IN for the study's tables; --set table=curated runs on the 4,983-molecule table (downloaded once, "
            "or --set table=PATH)"
        )
    elif not name.startswith(_CLOUD):
        rows = open_table(name, place_of(preset))
        lines.append(
            f"table: {name}, {len(rows)} molecules, {len(rows.invalid)} unparsable SMILES kept out. {rows.note}"
        )
    if preset.clouds:
        lines.append(f"known shapes beside it: {', '.join(preset.clouds)} ({CLOUD_ROWS} points each)")
    if any(member_of(r) is not None for r in preset.representations):
        lines.append("POM: own message-passing odor model trained here on the table's labels; not OpenPOM")
    return lines
