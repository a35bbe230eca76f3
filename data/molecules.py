"""Odorant tables and their chemical features.

Shapes: N molecules, B fingerprint bits, P descriptors, L odor labels (`bits_NB`, `physchem_NP`, `labels_NL`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rdkit import Chem, rdBase
from rdkit.Chem import Descriptors, rdFingerprintGenerator
from rdkit.Chem.Scaffolds import MurckoScaffold

from data import odor_sources
from data._content import file_sha256
from data._csv import label_values, read_csv
from data._launched import check

CURATED_ROWS = 4983
BROADER_ROWS = 5862
SMILES_COLUMNS = ("nonStereoSMILES", "IsomericSMILES", "SMILES", "smiles")
PHYSCHEM = {  # the study's name: RDKit's name
    "MolWt": "MolWt",
    "MolLogP": "MolLogP",
    "TPSA": "TPSA",
    "HDonors": "NumHDonors",
    "HAcceptors": "NumHAcceptors",
    "RotatableBonds": "NumRotatableBonds",
    "RingCount": "RingCount",
    "AromaticRings": "NumAromaticRings",
    "HeavyAtomCount": "HeavyAtomCount",
    "FractionCSP3": "FractionCSP3",
}
UNREADABLE = "RDKit cannot read it"
_CPUS_PER_BATCH = 0.02  # what packs leave free, so that features never wait for a pack to end
_EMBEDDED = Path(__file__).with_name("odorants.csv")


@dataclass(frozen=True, kw_only=True)
class MoleculeTable:
    """Molecules that RDKit can read, with row ids and binary odor labels.

    `frame` has columns `id` (the SMILES string of the source, unique), `row` (0-based row in the source) and
    `smiles`, then one 0/1 column per label, named by `labels`. `invalid` lists what was kept out: `row`, `smiles`,
    `reason`; `repeated` counts the molecules that repeat there, `other_labels` the repeats whose labels differ from the
    row that is kept. `no_labels` lists the columns of the source that are no labels, each with the reason;
    `blank_labels` the label columns with blank cells, which count as 0 (absent), each with their number. `note` says in
    words what the table is and where it came from.
    """

    name: str
    frame: pd.DataFrame
    labels: tuple[str, ...] = ()
    invalid: pd.DataFrame = field(default_factory=lambda: _invalid([]))
    repeated: int = 0
    other_labels: int = 0
    no_labels: tuple[tuple[str, str], ...] = ()
    blank_labels: tuple[tuple[str, int], ...] = ()
    note: str = ""

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def smiles(self) -> list[str]:
        return self.frame["smiles"].tolist()

    @property
    def ids(self) -> list[str]:
        return self.frame["id"].tolist()

    @property
    def labels_NL(self) -> np.ndarray:
        """uint8 [N, L] label matrix.

        Raises:
            ValueError: the table has no label columns.
        """
        if not self.labels:
            raise ValueError(f"table {self.name!r} has 0 label columns; use a labelled table such as curated()")
        return self.frame[list(self.labels)].to_numpy(np.uint8)


@dataclass(frozen=True, kw_only=True)
class NonOverlap:
    """The part of the broader table outside the curated one, and how far the two depend on each other.

    `stereo_share` is the share of its rows whose SMILES without stereochemistry is a curated molecule: such a row
    is a stereo variant of a molecule already seen. `published_rows` counts the rows left when the curated strings
    are canonicalised before they are compared, which explains the published 1,600.
    """

    table: MoleculeTable
    stereo_variants: int
    stereo_share: float
    published_rows: int
    note: str


def canonical(smiles: str, *, stereo: bool = True) -> str | None:
    """Canonical SMILES by RDKit, with stereochemistry if asked; None when RDKit cannot read the string."""
    mol = _mol(smiles)
    return None if mol is None else Chem.MolToSmiles(mol, isomericSmiles=stereo)


def read_table(path: str | Path, name: str | None = None) -> MoleculeTable:
    """Any CSV with a SMILES column (one of SMILES_COLUMNS) and 0/1 label columns (`data._csv.label_values`).

    Blank cells of a label column count as 0 and are counted in `blank_labels`. Rows that RDKit cannot read, and repeats
    of an earlier molecule (by canonical SMILES with stereochemistry, whatever the spelling), are listed in `invalid`
    and kept out: the first row of a molecule is the one that counts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no readable CSV, no SMILES column, no row that RDKit can read, or one molecule in all rows.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no table at {path}; pass an existing CSV with --set table=PATH")
    raw = read_csv(path)
    column = _smiles_column(raw, path)
    return _build(raw, column, name or path.stem, f"{path.name}, read from a file given by the user", path.name)


def curated(path: str | Path | None = None) -> MoleculeTable:
    """The curated GoodScents/Leffingwell table of OpenPOM: 4,983 molecules, 138 labels.

    Without a path the public file is downloaded once and cached (`data.odor_sources.fetch`). A file with another
    checksum is read as it is, and the note states that it is not the published table.

    Raises:
        ConnectionError, FileNotFoundError, ValueError: see `odor_sources.fetch` and `read_table`.
    """
    name = "curated_GS_LF_merged_4983.csv"
    path = odor_sources.fetch(name) if path is None else Path(path)
    table = read_table(path, "curated")
    if file_sha256(path) == odor_sources.SOURCES[name].sha256:
        note = f"curated GS/LF table of OpenPOM, {len(table)} molecules, {len(table.labels)} labels"
    else:
        note = f"{path.name}: {len(table)} molecules, NOT the published curated table of {CURATED_ROWS} (checksum)"
    return replace(table, note=note)


def broader(goodscents: str | Path | None = None, leffingwell: str | Path | None = None) -> MoleculeTable:
    """Union of the canonical isomeric SMILES of pyrfume's GoodScents and Leffingwell molecule files: 5,862 rows.

    Order: first appearance, GoodScents before Leffingwell; `row` counts over the two files one after the other.
    The molecule files hold no labels. Without paths the public files are downloaded once and cached.

    Raises:
        ConnectionError, FileNotFoundError, ValueError: see `odor_sources.fetch` and `read_table`.
    """
    names = ("pyrfume_goodscents_molecules.csv", "pyrfume_leffingwell_molecules.csv")
    columns = []
    for name, given in zip(names, (goodscents, leffingwell), strict=True):
        path = odor_sources.fetch(name) if given is None else Path(given)
        if not path.is_file():
            raise FileNotFoundError(f"no table at {path}; pass the molecules file of pyrfume-data")
        raw = read_csv(path)
        columns.append(raw[_smiles_column(raw, path)])
    strings = pd.concat(columns, ignore_index=True)
    first_row: dict[str, int] = {}
    bad = []
    for row, string in enumerate(strings):
        key = canonical(string)
        if key is None:
            bad.append((row, string, UNREADABLE))
        else:
            first_row.setdefault(key, row)
    frame = pd.DataFrame({"id": list(first_row), "row": list(first_row.values()), "smiles": list(first_row)})
    expected = "" if len(frame) == BROADER_ROWS else f", NOT the {BROADER_ROWS} of the published files"
    note = f"broader GS/LF table: union of {len(strings)} rows, {len(frame)} canonical isomeric SMILES{expected}"
    return MoleculeTable(name="broader", frame=frame, invalid=_invalid(bad), note=note)


def nonoverlap(broad: MoleculeTable, curate: MoleculeTable) -> NonOverlap:
    """Rows of `broad` whose SMILES string is not in `curate`, with the dependence of the two measured."""
    seen = set(curate.smiles)
    frame = broad.frame[~broad.frame["smiles"].isin(seen)].reset_index(drop=True)
    rewritten = {canonical(s) for s in seen}
    flat = {canonical(s, stereo=False) for s in seen}
    variants = sum(canonical(s, stereo=False) in flat for s in frame["smiles"])
    share = variants / len(frame) if len(frame) else 0.0
    published = int((~broad.frame["smiles"].isin(rewritten)).sum())
    note = (
        f"non-overlap subset: {len(frame)} of {len(broad)} rows by string ({published} when the curated strings are "
        f"canonicalised first); {variants} of them ({share:.0%}) are stereo variants of molecules in the curated "
        f"table, so this subset is not an independent sample"
    )
    table = MoleculeTable(name="nonoverlap", frame=frame, invalid=broad.invalid, note=note)
    return NonOverlap(table=table, stereo_variants=variants, stereo_share=share, published_rows=published, note=note)


def found_among(smiles: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """bool [N]: whether each molecule is one of the others, stereochemistry left out."""
    known = {canonical(s, stereo=False) for s in others}
    return np.array([canonical(s, stereo=False) in known for s in smiles], bool)


def embedded() -> MoleculeTable:
    """A few hundred common odorants with textbook odor labels, shipped with the code: the default without a table."""
    raw = pd.read_csv(_EMBEDDED)
    names = sorted({label for cell in raw["labels"] for label in cell.split(";")})
    onehot = raw["labels"].str.get_dummies(sep=";")[names]
    table = _build(pd.concat([raw[["smiles"]], onehot], axis=1), "smiles", "embedded", "", _EMBEDDED.name)
    note = (
        f"embedded default: {len(table)} common odorants with {len(names)} textbook labels; "
        f"a small stand-in, not the published tables"
    )
    return replace(table, note=note)


def morgan(smiles: Sequence[str], radius: int = 4, n_bits: int = 2048, counts: bool = False) -> np.ndarray:
    """Morgan fingerprints (Rogers & Hahn 2010), hashed to n_bits; no chirality, no feature invariants.

    Returns bool [N, B], or int32 [N, B] of environment counts.

    Raises:
        ValueError: a SMILES that RDKit cannot read, or radius < 0, or n_bits < 1.
    """
    if radius < 0 or n_bits < 1:
        raise ValueError(f"radius={radius}, n_bits={n_bits}; choose radius >= 0 and n_bits >= 1")
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=n_bits, includeChirality=False)
    out_NB = np.zeros((len(smiles), n_bits), np.int32 if counts else bool)
    for row, mol in enumerate(_mols(smiles)):
        out_NB[row] = generator.GetCountFingerprintAsNumPy(mol) if counts else generator.GetFingerprintAsNumPy(mol)
    return out_NB


def skeletons(smiles: Sequence[str]) -> list[str]:
    """Group labels for splits: molecules with the same frame share one, and so do stereo variants and repeats.

    The frame is the Bemis-Murcko scaffold (J. Med. Chem. 1996) without atom and bond types; of a molecule without
    rings, which has no scaffold, it is the whole graph of heavy atoms without types.

    Raises:
        ValueError: a SMILES that RDKit cannot read.
    """
    return [_frame(mol) for mol in _mols(smiles)]


def _frame(mol: Chem.Mol) -> str:
    if mol.GetRingInfo().NumRings():
        mol = MurckoScaffold.GetScaffoldForMol(mol)
    plain = Chem.RWMol()
    for _ in range(mol.GetNumAtoms()):
        plain.AddAtom(Chem.Atom(0))
    for bond in mol.GetBonds():
        plain.AddBond(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), Chem.BondType.SINGLE)
    return Chem.MolToSmiles(plain)


def physchem(smiles: Sequence[str]) -> np.ndarray:
    """The descriptors of PHYSCHEM, in its order and natural units (Da, Å² for TPSA): float64 [N, 10].

    Raises:
        ValueError: a SMILES that RDKit cannot read.
    """
    known = dict(Descriptors.descList)
    describe = [known[name] for name in PHYSCHEM.values()]
    rows = [[float(f(mol)) for f in describe] for mol in _mols(smiles)]
    return np.asarray(rows, np.float64).reshape(len(smiles), len(PHYSCHEM))


def zscore(x_NP: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and population standard deviation 1; a constant column becomes 0."""
    spread_P = x_NP.std(axis=0)
    return (x_NP - x_NP.mean(axis=0)) / np.where(spread_P > 0, spread_P, 1.0)


FEATURES = {
    "bits_r4": lambda smiles: morgan(smiles, 4),
    "bits_r2": lambda smiles: morgan(smiles, 2),
    "counts_r4": lambda smiles: morgan(smiles, 4, counts=True),
    "physchem": physchem,
}


def featurise(smiles: Sequence[str], what: str, ray: bool = False, batch_size: int = 512) -> np.ndarray:
    """The features named `what` (a key of FEATURES; physchem is not z-scored), in the order of `smiles`.

    With `ray` the work is spread by Ray Data over the cluster that `ray.init` has joined; the result is the same.

    Raises:
        ValueError: an unknown `what`, or a SMILES that RDKit cannot read.
    """
    if what not in FEATURES:
        raise ValueError(f"what={what!r} is no feature set; choose one of {sorted(FEATURES)}")
    if not ray or not len(smiles):
        return FEATURES[what](smiles)
    _mols(smiles)  # here, because an error raised on a worker reaches the user as a page of traceback
    import ray.data as ray_data

    def batch(rows: Any) -> Any:
        check()
        return {"row": rows["row"], "x": FEATURES[what](rows["smiles"].tolist())}

    table = pd.DataFrame({"row": np.arange(len(smiles)), "smiles": list(smiles)})
    blocks = ray_data.from_pandas([table[i : i + batch_size] for i in range(0, len(table), batch_size)])
    spread = blocks.map_batches(batch, batch_size=batch_size, num_cpus=_CPUS_PER_BATCH)
    batches = list(spread.iter_batches(batch_format="numpy"))
    order = np.argsort(np.concatenate([b["row"] for b in batches]), kind="stable")
    return np.concatenate([b["x"] for b in batches])[order]


def _build(raw: pd.DataFrame, column: str, name: str, note: str, source: str) -> MoleculeTable:
    columns = {c: label_values(raw[c]) for c in raw.columns if c != column}
    found = pd.DataFrame({c: values for c, values in columns.items() if not isinstance(values, str)}, index=raw.index)
    keep, bad, repeats = _distinct(raw[column])
    if not keep:
        raise ValueError(f"{source}: 0 of {len(raw)} rows have a SMILES RDKit can read; check column {column!r}")
    if len(keep) == 1 and repeats:
        raise ValueError(
            f"{source}: its {len(repeats) + 1} readable rows are all one molecule, {raw[column].iloc[keep[0]]}; give a "
            "table of several"
        )
    kept = raw.iloc[keep]
    frame = pd.DataFrame({"id": kept[column].to_numpy(), "row": keep, "smiles": kept[column].to_numpy()})
    whole = found.fillna(0).astype(np.uint8)
    blank = found.iloc[keep].isna().sum()
    return MoleculeTable(
        name=name,
        frame=pd.concat([frame, whole.iloc[keep].reset_index(drop=True)], axis=1),
        labels=tuple(found.columns),
        invalid=_invalid(bad),
        repeated=len(set(repeats.values())),
        other_labels=sum(not whole.iloc[row].equals(whole.iloc[first]) for row, first in repeats.items()),
        no_labels=tuple((str(c), reason) for c, reason in columns.items() if isinstance(reason, str)),
        blank_labels=tuple((str(c), int(count)) for c, count in blank.items() if count),
        note=note,
    )


def _distinct(strings: pd.Series) -> tuple[list[int], list[tuple[int, object, str]], dict[int, int]]:
    """(rows of distinct molecules, the others with their reasons, {row of a repeat: row of its molecule})."""
    first: dict[str, int] = {}
    keep: list[int] = []
    bad: list[tuple[int, object, str]] = []
    repeats: dict[int, int] = {}
    for row, string in enumerate(strings):
        mol = _mol(string)
        if mol is None:
            bad.append((row, string, UNREADABLE))
            continue
        seen = first.setdefault(Chem.MolToSmiles(mol), row)
        if seen == row:
            keep.append(row)
        else:
            same = string == strings.iloc[seen]
            bad.append((row, string, "repeats an earlier row" if same else "another spelling of an earlier row"))
            repeats[row] = seen
    return keep, bad, repeats


def _smiles_column(raw: pd.DataFrame, path: Path) -> str:
    for column in SMILES_COLUMNS:
        if column in raw.columns:
            return column
    shown = ", ".join(map(str, raw.columns[:5]))
    raise ValueError(f"{path.name} has columns {shown}; a table needs one of {', '.join(SMILES_COLUMNS)}")


def _invalid(rows: list[tuple[int, object, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["row", "smiles", "reason"])


def _mol(smiles: object) -> Chem.Mol | None:
    if not isinstance(smiles, str) or not smiles.strip():
        return None
    with rdBase.BlockLogs():
        return Chem.MolFromSmiles(smiles)


def _mols(smiles: Sequence[str]) -> list[Chem.Mol]:
    mols, bad = [], []
    for row, string in enumerate(smiles):
        mol = _mol(string)
        if mol is None:
            bad.append(row)
        else:
            mols.append(mol)
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(smiles)} SMILES cannot be read by RDKit, the first {smiles[bad[0]]!r} at row "
            f"{bad[0]}; read them through a MoleculeTable, which lists such rows and keeps them out"
        )
    return mols
