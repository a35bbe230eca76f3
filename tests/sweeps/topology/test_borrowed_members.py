"""The odor model on tables without labels: trained on the curated table, and what it has seen of them is said."""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data import molecules
from models.odor import member as member_module
from sweeps.core.cells import UserError
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext
from sweeps.ledger.ledger import Ledger
from sweeps.topology import sources
from sweeps.topology.cells import Audit, MemberCell
from sweeps.topology.run import run_pack
from sweeps.topology.sweep import SWEEP

STEREO = ["C/C=C/CCC", "C/C=C\\CCC"]  # of a curated molecule, CC=CCCC
NEW = ["CCOCCOCC", "CCCCCCCCCCCCCC", "CCSCCSCC"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Source files in the published layout: a small curated table, and others that overlap it."""
    rows = molecules.embedded().frame.head(119)
    labels = [name for name in rows.columns[3:] if 10 <= rows[name].sum() <= 100][:3]
    flat = [str(molecules.canonical(s, stereo=False)) for s in rows["smiles"]]
    table = pd.DataFrame({"nonStereoSMILES": flat, **{name: rows[name].tolist() for name in labels}})
    more = pd.DataFrame({"nonStereoSMILES": ["CC=CCCC"], **{name: [int(name == labels[0])] for name in labels}})
    table = pd.concat([table, more]).drop_duplicates("nonStereoSMILES")
    table.to_csv(tmp_path / "curated_GS_LF_merged_4983.csv", index=False)
    pd.DataFrame({"IsomericSMILES": [*flat[:5], *STEREO]}).to_csv(
        tmp_path / "pyrfume_goodscents_molecules.csv", index=False
    )
    pd.DataFrame({"IsomericSMILES": NEW}).to_csv(tmp_path / "pyrfume_leffingwell_molecules.csv", index=False)
    sources.open_table.cache_clear()
    yield tmp_path
    sources.open_table.cache_clear()


def audit(folder: Path, table: str) -> Audit:
    return Audit(
        study="paper", table=table, table_path=str(folder), representations=("pom_0",), metrics=("euclidean",),
        runs=1, pom_epochs=1,
    )  # fmt: skip


def test_members_trained_on_the_curated_table_embed_tables_without_labels(folder: Path) -> None:
    for table, seen in (("broader", 7), ("nonoverlap", 2)):
        preset = audit(folder, table)
        ledger = Ledger(f"memory://{uuid.uuid4().hex}", "odor_topology", "1")
        context = PackContext(ledger, RunSettings(), threads=1, device="cpu", fingerprint=lambda cell: "f")
        cells = SWEEP.plan(preset)
        machine = Machine(nodes=1, cpus=2, gpus=0, memory_bytes=2**34, hardware="test")
        while missing := [c for c in cells if c.key not in ledger.done()]:
            for pack in SWEEP.pack(missing, preset, machine, RunSettings()):
                run_pack(list(pack.cells), preset, context)  # type: ignore[arg-type]
        (member,) = [c for c in cells if isinstance(c, MemberCell)]
        assert member.table == table
        rows = sources.open_table(table, str(folder))
        files = [np.load(io.BytesIO(ledger.file(member.key, f"{n}.npy"))) for n in ("embedding", "trained_on")]
        assert files[0].shape == (len(rows), member_module.EMBEDDING)
        (published,) = ledger.read_many([member.key])
        values = published.rows.set_index("metric")["value"]
        assert values["rows_of_training_table"] == seen
        assert values["rows_trained_on"] == files[1].sum() <= seen
        assert not files[1][[rows.smiles.index(str(molecules.canonical(s))) for s in NEW]].any()
        assert f"{seen} of the {len(rows)} molecules of {table} are in that table" in "\n".join(
            SWEEP.banner("paper", preset)
        )
    pair = [rows.smiles.index(str(molecules.canonical(s))) for s in STEREO]
    assert np.array_equal(*files[0][pair])  # stereo variants of one molecule: the model cannot tell them apart


def test_the_net_of_a_member_embeds_its_own_molecules_as_the_member_did(folder: Path) -> None:
    rows = sources.open_table("curated", str(folder))
    member = member_module.train_member(rows.smiles, rows.labels_NL, 0, epochs=1)
    np.testing.assert_allclose(member_module.embed(member.net, rows.smiles), member.embedding_NE, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        member_module.embed(member.net, rows.smiles[7:9]), member.embedding_NE[7:9], rtol=1e-4, atol=1e-5
    )


def test_labels_of_the_curated_table_are_in_the_fingerprints_of_what_hangs_on_them(folder: Path) -> None:
    def prints() -> list[str]:
        sources.open_table.cache_clear()
        for digest in (sources._label_digest, sources._table_digest):
            digest.cache_clear()
        preset = replace(audit(folder, "broader"), representations=("pom_0", "bits_r4"), metrics=())
        return [SWEEP.fingerprint(c, preset, RunSettings()) for c in SWEEP.plan(preset)]

    before = prints()
    path = folder / "curated_GS_LF_merged_4983.csv"
    table = pd.read_csv(path)
    table.loc[0, table.columns[1]] = 1 - table[table.columns[1]].iloc[0]
    table.to_csv(path, index=False)
    after = prints()
    of_pom = [c.representation == "pom_0" for c in SWEEP.plan(replace(audit(folder, "broader"), metrics=()))]
    assert [a != b for a, b in zip(before, after, strict=True)][: len(of_pom)] == [True] * len(of_pom)
    assert before[-1] == after[-1]  # a diagram of fingerprints


def test_the_utility_study_still_needs_labels_of_the_table_itself(folder: Path) -> None:
    with pytest.raises(UserError, match="table broader has 0 label columns and the utility study needs them"):
        SWEEP.plan(replace(audit(folder, "broader"), study="utility"))
