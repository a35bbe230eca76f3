"""The topology audit as a sweep: published protocol, seeds, known shapes, tables by content, bad input."""

from __future__ import annotations

import hashlib
import json
import sys
import uuid
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from analysis.topology import utility, utility_folds, utility_models
from data import molecules
from data._content import file_sha256
from models.odor import bottleneck
from models.odor.member import split
from sweeps.core.cells import UserError
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext
from sweeps.ledger.ledger import Ledger
from sweeps.topology import run as run_module
from sweeps.topology import sources
from sweeps.topology.cells import Audit, DiagramCell, MemberCell, landmark_seed, null_seed, run_rows
from sweeps.topology.presets import PRESETS
from sweeps.topology.report import write
from sweeps.topology.run import null_rows, run_pack
from sweeps.topology.sources import table_name
from sweeps.topology.sweep import SWEEP

SHAPES = Audit(
    study="audit",
    table="cloud:circle",
    clouds=("gaussian_blob",),
    draws=117,
    runs=3,
    rows=120,
    null_stream="joint",
    full_table=True,
    full_draws=39,
)
MACHINE = Machine(nodes=1, cpus=2, gpus=0, memory_bytes=8 * 2**30, hardware="test")


def run(preset: Audit, ledger: Ledger | None = None) -> Ledger:
    ledger = ledger or Ledger(f"memory://{uuid.uuid4().hex}", "odor_topology", "1")
    context = PackContext(ledger, RunSettings(), threads=1, device="cpu", fingerprint=lambda cell: "f")
    cells = SWEEP.plan(preset)
    while missing := [c for c in cells if c.key not in ledger.done()]:
        for pack in SWEEP.pack(missing, preset, MACHINE, RunSettings()):
            run_pack(list(pack.cells), preset, context)
    return ledger


def test_known_shapes_get_their_verdicts(tmp_path: Path) -> None:
    ledger = run(SHAPES)
    keys = [c.key for c in SWEEP.plan(SHAPES)]
    assert ledger.done() == set(keys)
    lines = write(ledger.read_many(keys), "audit", SHAPES, tmp_path)
    assert lines[0].startswith("answer       real, uniqueness not tested: cloud:circle points (top-1 ratio ")
    assert lines[1].startswith("             not distinguishable: cloud:gaussian_blob points (top-1 ratio ")
    assert lines[0].endswith("p Holm 0.025).")
    report = (tmp_path / "report.md").read_text()
    assert all(f"- {line[13:]}" in report for line in lines[:2])
    import pandas as pd

    table = pd.read_parquet(tmp_path / "cells.parquet")
    assert {"table", "representation", "metric", "route", "statistic", "value", "lo", "hi", "p", "null"} <= set(table)
    ratio = table[(table["table"] == "cloud:circle") & (table["statistic"] == "top1_ratio")].iloc[0]
    assert ratio["value"] > 2
    summary = json.loads((tmp_path / "summary.json").read_text())  # what MLflow shows of the launch
    assert summary["ratio/cloud:circle points euclidean direct"] == pytest.approx(ratio["value"])
    assert summary["verdict/cloud:circle points"] == "real, uniqueness not tested"
    assert np.isnan(ratio["lo"])  # 117 draws of three runs bound no 95th percentile from above
    assert "lower limit needs ≥ 72 independent null draws, 117 are worth" in ratio["needs"]
    shares = table[table["statistic"] == "observed_top1_quantile_full"].set_index("table")["value"]
    assert shares["cloud:circle"] > 0.3 > shares["cloud:gaussian_blob"] > 0
    tested = table.set_index(["table", "statistic"])["value"]
    assert tested["cloud:circle", "p_full_table"] == tested["cloud:circle", "p_subsamples"] == 1 / 40
    loops = pd.read_parquet(tmp_path / "universal.parquet").set_index("table")
    circle, blob = loops.loc["cloud:circle"], loops.loc["cloud:gaussian_blob"]
    assert circle["p"].to_numpy().argmin() == (circle["death"] - circle["birth"]).to_numpy().argmax()
    assert circle["p"].min() < blob["p"].min()
    for name in ("report.md", "ratios.png", "nulls.png", "diagrams.png", "barcodes.png"):
        assert (tmp_path / name).stat().st_size > 500


def test_draws_do_not_depend_on_how_they_are_cut_into_cells() -> None:
    whole = replace(SHAPES, draws=4, runs=1, clouds=(), draws_per_cell=4)
    parts = replace(whole, draws_per_cell=1)
    values = []
    for preset in (whole, parts):
        ledger = run(preset)
        rows = [
            (c.identity["null"], draw, value)
            for c in ledger.read_many([c.key for c in SWEEP.plan(preset)])
            if c.identity["null"] != "observed"
            for draw, value in c.rows.loc[c.rows["metric"] == "h1_top1", ["draw", "value"]].to_numpy()
        ]
        values.append(sorted(rows))
    assert values[0] == values[1]


def test_a_joint_draw_is_one_table_for_all_runs() -> None:
    preset = replace(SHAPES, table="embedded", clouds=(), representations=("bits_r4",), draws=10, full_draws=5)
    cells = [c for c in SWEEP.plan(preset) if isinstance(c, DiagramCell) and c.null == "fixed_margin"]
    assert [(c.run, c.draws) for c in cells] == [(-1, 5), (0, 4), (1, 4), (2, 4)]  # 10 over 3 runs, rounded up
    assert len({null_seed(c, 3) for c in cells}) == 1
    assert null_seed(cells[0], 3) != null_seed(cells[0], 2)
    bits = molecules.morgan(molecules.embedded().smiles)
    whole = null_rows(cells[0], 1, bits, np.arange(len(bits)))
    assert (whole.sum(axis=0) == bits.sum(axis=0)).all()
    rows_n = run_rows(len(bits), 2, 120)
    np.testing.assert_array_equal(null_rows(cells[-1], 1, bits, rows_n), whole[rows_n])
    own = replace(cells[-1], null_stream="fast")
    assert (null_rows(own, 1, bits, rows_n).sum(axis=0) == bits[rows_n].sum(axis=0)).all()


def test_keys_of_cells_that_mean_the_same_stay() -> None:
    """Digests of the plans' keys at the commit before joint draws."""
    audit = replace(PRESETS["audit"], representations=("bits_r4",), clouds=())
    paper = replace(PRESETS["paper"], representations=("bits_r4", "physchem"))
    observed = [c for c in SWEEP.plan(audit) if isinstance(c, DiagramCell) and c.null == "observed"]
    for cells, known in ((observed, "5e52faab6e9b134c"), (SWEEP.plan(paper), "7c9591c8e21b04b8")):
        assert hashlib.sha256("".join(c.key for c in cells).encode()).hexdigest()[:16] == known


def test_runs_and_seeds_are_the_published_ones() -> None:
    rows = run_rows(4983, 3, 1000)
    assert (rows == np.sort(np.random.default_rng(3).choice(4983, 1000, replace=False))).all()
    assert (run_rows(900, 3, 1000) == np.arange(900)).all()
    cell = DiagramCell(
        table="curated",
        representation="bits_r4",
        metric="jaccard",
        route="landmark",
        run=3,
        rows=1000,
        landmarks=250,
        null="bernoulli",
    )
    assert null_seed(cell, 0) == 3 + 20_000
    assert landmark_seed(cell, 0) == 3 + 500_000 + 2_000
    assert landmark_seed(replace(cell, null="observed"), 0) == 500_003
    assert len({null_seed(cell, b) for b in range(1000)}) == 1000


def test_paper_preset_is_the_published_protocol() -> None:
    cells = SWEEP.plan(PRESETS["paper"])
    bits = [c for c in cells if isinstance(c, DiagramCell) and c.representation == "bits_r4" and c.route == "direct"]
    assert len(bits) == 8 * (1 + 3)
    assert {c.null_stream for c in bits} == {"fast", "published"}
    assert all(c.draws == 1 for c in bits)
    assert any(isinstance(c, MemberCell) for c in cells)


MEMBERS = Audit(study="paper", representations=("pom_0", "pom_1"), metrics=("euclidean",), runs=1, pom_epochs=1)


def test_members_are_trials_of_their_own_and_their_diagrams_wait() -> None:
    cells = SWEEP.plan(MEMBERS)
    first = SWEEP.pack(cells, MEMBERS, MACHINE, RunSettings())
    assert [[c.kind for c in p.cells] for p in first] == [["member"], ["member"]]  # type: ignore[attr-defined]
    assert len({p.name for p in first}) == 2
    trained = {p.cells[0].key for p in first}
    second = SWEEP.pack([c for c in cells if c.key not in trained], MEMBERS, MACHINE, RunSettings())
    assert {c.key for p in second for c in p.cells} == {c.key for c in cells} - trained
    beside = replace(MEMBERS, representations=("pom_0", "bits_r4"), metrics=())
    names = [p.name for p in SWEEP.pack(SWEEP.plan(beside), beside, MACHINE, RunSettings())]
    assert names == ["embedded-pom_0-member", "embedded-bits_r4-00"]


def test_a_member_is_trained_once_for_all_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    real = run_module.train_member

    def counted(smiles: list[str], labels_NL: np.ndarray, seed: int, **settings: Any) -> Any:
        trained.append(seed)
        return real(smiles, labels_NL, seed, **settings)

    monkeypatch.setattr(run_module, "train_member", counted)
    ledger = run(MEMBERS)
    assert trained == [0, 1]
    members = [c for c in ledger.read_many(sorted(ledger.done())) if c.identity["kind"] == "member"]
    assert all("embedding.npy" in c.files for c in members)
    later = replace(MEMBERS, study="ensemble", metrics=("cosine",), draws=2)
    run(later, ledger)
    assert trained == [0, 1]
    assert {c.key for c in SWEEP.plan(later)} <= ledger.done()
    alone = [c for c in SWEEP.plan(replace(MEMBERS, pom_epochs=2)) if isinstance(c, DiagramCell)][:1]
    context = PackContext(ledger, RunSettings(), threads=1, device="cpu", fingerprint=lambda cell: "f")
    run_pack(alone, replace(MEMBERS, pom_epochs=2), context)  # as with --only: its member is trained and published
    assert trained == [0, 1, 0]


def test_utility_reports_the_control_and_a_p_where_no_molecule_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utility_folds, "REPEATS", 1)
    monkeypatch.setattr(utility, "FAMILIES", {"ridge": utility_models.ridge, "trees": utility_models.ridge})
    splits = ("neighbourhood", "random", "grouped")
    preset = Audit(study="utility", representations=("bits_r4",), neighbours=8, permutations=19, splits=splits)
    ledger = run(preset)
    published = ledger.read_many([c.key for c in SWEEP.plan(preset)])
    assert [c.identity["split"] for c in published] == list(splits)
    near = [c.rows.set_index("metric").loc["utility_neighbours_in_training", "value"] for c in published]
    assert near[0] == 0
    assert near[1] == pytest.approx(0.8, abs=0.03)
    assert near[2] < near[1] - 0.2
    assert [(c.rows["metric"] == "utility_p").sum() for c in published] == [3, 0, 0]
    write(published, "utility", preset, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# ")  # below which the launcher says that cells are missing
    for name in splits:
        assert f"| embedded | bits_r4 | jaccard | {name} | 432 | 432 |" in text
    assert "+0.0476 and +0.0415" in text
    assert (tmp_path / "utility.png").stat().st_size > 500


def test_utility_of_the_own_model_uses_its_test_split_and_says_where_rows_are_too_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utility_folds, "REPEATS", 1)
    monkeypatch.setattr(utility, "FAMILIES", {"ridge": utility_models.ridge, "trees": utility_models.ridge})
    preset = Audit(
        study="utility", representations=("pom_0",), metrics=("cosine",), pom_epochs=1, neighbours=20, permutations=19
    )
    cells = SWEEP.plan(preset)
    ledger = run(preset)
    published = [c for c in ledger.read_many([c.key for c in cells]) if c.identity["kind"] == "utility"]
    values = [c.rows.set_index("metric")["value"] for c in published]
    tested = len(split(molecules.embedded().labels_NL).test)
    assert [v["utility_rows"] for v in values] == [tested, tested]
    assert values[0]["utility_label_jaccard_train"] == values[1]["utility_label_jaccard_train"] > 0
    assert [c.identity["split"] for c in published] == ["neighbourhood", "random"]
    assert values[0]["utility_tested"] == 0  # so few rows leave nothing apart
    assert "utility_p" not in values[0]
    write(published, "utility", preset, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert f"patches of 21 among {tested} rows leave too few for neighbourhood folds" in text
    assert f"| embedded | pom_0 | cosine | neighbourhood | {tested} | 0 | – |" in text


def test_plan_is_measured_and_says_what_is_shared() -> None:
    preset = Audit(study="paper", representations=("bits_r4", "pom_0"), runs=2, rows=100, pom_epochs=5)
    cells = SWEEP.plan(preset)
    found = SWEEP.estimate(cells, preset, MACHINE, RunSettings())
    assert found.shared == (
        "2 representations, each computed once a process for all its cells",
        "1 members of the odor model to train, each once, kept for every other preset",
        "6 observed diagrams and 14 null draws",
    )
    assert (found.lm_passes, found.tokens) == (0, 0)
    assert "CPU time of a short probe" in found.basis
    longer = replace(preset, pom_epochs=50)
    assert SWEEP.estimate(SWEEP.plan(longer), longer, MACHINE, RunSettings()).seconds > 2 * found.seconds > 0
    guessed = SWEEP.estimate(cells, preset, MACHINE, RunSettings(probe=False))
    assert "not measured" in guessed.basis
    assert SWEEP.estimate([], preset, MACHINE, RunSettings()).seconds == 0


def test_a_table_that_does_not_fit_is_refused_before_the_run() -> None:
    preset = Audit(study="audit", representations=("bits_r4",), full_table=True)
    small = replace(MACHINE, memory_bytes=2**30)
    with pytest.raises(UserError, match=r"bits_r4: the distances and H1 of 432 rows need up to .* may be used; choose"):
        SWEEP.pack(SWEEP.plan(preset), preset, small, RunSettings())


def embedding_file(path: Path, seed: int, rows: slice = slice(None)) -> str:
    ids = molecules.embedded().ids
    np.savez(path, ids=np.array(ids[rows]), embedding=np.random.default_rng(seed).normal(size=(len(ids), 4))[rows])
    return str(path)


OWN = Audit(study="ensemble", representations=(), runs=1, rows=40, metrics=("cosine",))


def test_embeddings_of_ones_own_share_a_ledger_and_are_named_in_banner_and_report(tmp_path: Path) -> None:
    one, two = embedding_file(tmp_path / "gnn_0.npz", 0), embedding_file(tmp_path / "gnn_1.npz", 1)
    ledger = run(replace(OWN, embedding=(one,)))
    both = replace(OWN, embedding=(one, two))
    run(both, ledger)
    names = [f"file:{Path(path).stem}-{file_sha256(path)[:12]}" for path in both.embedding]
    published = ledger.read_many(c.key for c in SWEEP.plan(both))
    assert {c.identity["representation"] for c in published} == set(names)
    assert len({SWEEP.fingerprint(c, both, RunSettings()) for c in SWEEP.plan(both)}) == len(published)
    banner = SWEEP.banner("ensemble", both)
    assert [f"embedding {name}: given as a file, 432 rows of 4 dimensions" in banner for name in names] == [True, True]
    write([], "ensemble", both, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert all(f"embedding {name}" in text for name in names)
    assert f"| {names[0]} | {names[1]} |" in text
    assert (tmp_path / "report" / "ensemble.png").stat().st_size > 500


def test_embeddings_that_do_not_fit_are_refused_before_the_run(tmp_path: Path) -> None:
    good, short = embedding_file(tmp_path / "a.npz", 0), embedding_file(tmp_path / "b.npz", 0, slice(-1))
    with pytest.raises(UserError, match=r"no embedding at .*absent\.npz; pass an existing"):
        SWEEP.plan(replace(OWN, embedding=(good, str(tmp_path / "absent.npz"))))
    with pytest.raises(UserError, match=r"b\.npz: 1 of 432 table rows have no embedding"):
        SWEEP.plan(replace(OWN, embedding=(good, short)))
    with pytest.raises(UserError, match="has no rows of cloud:circle"):
        SWEEP.plan(replace(OWN, table="cloud:circle", embedding=(good,)))


def test_bottlenecks_are_those_of_the_bits_with_the_seed_in_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bottleneck.METHODS, "ae256", partial(bottleneck.autoencoder, epochs=1, hidden=16))
    names = ("pca256", "rp256_1", "ae256_0", "ae256_1")
    ledger = run(replace(PRESETS["bottleneck"], representations=names, runs=1, draws=1, rows=30, metrics=("cosine",)))
    top = {
        c.identity["representation"]: c.rows["value"].max()
        for c in ledger.read_many(sorted(ledger.done()))
        if c.identity["null"] == "observed"
    }
    assert set(top) == set(names)
    assert top["ae256_0"] != top["ae256_1"]
    bits = molecules.morgan(molecules.embedded().smiles)
    projected = sources.matrix("embedded", "rp256_1", "")
    np.testing.assert_array_equal(projected, bottleneck.random_projection(bits, seed=1))
    assert projected.shape == (432, 256)


def test_large_tables_are_featurised_by_ray_data(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        molecules, "featurise", lambda smiles, what, ray=False: asked.append((len(smiles), ray)) or np.zeros(1)
    )
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    for rows in (5_000, 50_000):
        sources._features(["C"] * rows, "bits_r4")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    sources._features(["C"] * 50_000, "bits_r4")
    assert asked == [(5_000, False), (50_000, True), (50_000, False)]


def test_table_is_named_by_content(tmp_path: Path) -> None:
    a, b = tmp_path / "a.csv", tmp_path / "elsewhere" / "a.csv"
    b.parent.mkdir()
    for path in (a, b):
        path.write_text("smiles,sweet\nCCO,1\nCCCO,0\n")
    assert table_name(str(a)) == table_name(str(b))
    b.write_text("smiles,sweet\nCCO,1\nCCCCO,0\n")
    assert table_name(str(a)) != table_name(str(b))


def test_rows_kept_out_are_counted_by_reason_and_listed(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("smiles,sweet\n" + "C(,1\n" + "".join(f"{'C' * n}O,{n % 2}\n" for n in (1, 1, 2, 2, *range(3, 9))))
    preset = Audit(study="audit", table=str(path), representations=("bits_r4",), rows=6, runs=1, draws=1)
    assert "8 molecules, 1 kept out (RDKit cannot read it), 2 kept out (repeats an earlier row)." in "".join(
        SWEEP.banner("audit", preset)
    )
    write([], "audit", preset, tmp_path / "report")
    assert (tmp_path / "report" / "invalid.csv").read_text().splitlines() == [
        "row,smiles,reason",
        "0,C(,RDKit cannot read it",
        "2,CO,repeats an earlier row",
        "4,CCO,repeats an earlier row",
    ]


LABELLED = ("bits_r4", "pom_0")


def test_edited_labels_are_other_members_and_utility_but_the_same_diagrams(tmp_path: Path) -> None:
    cells = [c for study in ("audit", "utility") for c in SWEEP.plan(Audit(study=study, representations=LABELLED))]
    prints = []
    for label in (0, 1):  # a table that is curated by name alone: its identity says nothing of its content
        folder = tmp_path / str(label)
        folder.mkdir()
        text = f"nonStereoSMILES,sweet\nCO,1\nCCO,0\nCCCO,{label}\n"
        (folder / "curated_GS_LF_merged_4983.csv").write_text(text)
        preset = Audit(study="audit", table="curated", table_path=str(folder))
        prints.append([SWEEP.fingerprint(replace(c, table="curated"), preset, RunSettings()) for c in cells])
    same = {(c.kind, c.representation): a == b for c, a, b in zip(cells, *prints, strict=True)}
    assert same == {
        ("diagram", "bits_r4"): True,
        ("member", "pom_0"): False,
        ("diagram", "pom_0"): False,
        ("utility", "bits_r4"): False,
        ("utility", "pom_0"): False,
    }


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    for change, line in (
        ({"table": "curatd"}, "table 'curatd' is no file and no known table; did you mean curated?"),
        ({"representations": ("bits_r5",)}, "representation 'bits_r5' is not known; did you mean bits_r4?"),
        (
            {"study": "utility", "neighbours": 5000},
            "neighbours=5000 makes patches of 5001, more than a fifth of the table's 432 rows; choose neighbours <= 85",
        ),
        ({"null_stream": "slow"}, "null_stream='slow' is not known; choose fast or published"),
        (
            {"study": "utility", "splits": ("odd",)},
            "split='odd' is not known; choose from neighbourhood, random, grouped",
        ),
        (
            {"routes": ("landmark",), "landmarks": 346},
            "landmarks=346 of embedded's rows=345 a run; choose 1 <= landmarks <= rows (--set landmarks=N)",
        ),
        ({"routes": ("landmarks",)}, "route='landmarks' is not known; choose direct or landmark"),
        ({"metrics": ("cosin",)}, "metric 'cosin' is not known; did you mean cosine?"),
        ({"runs": 0}, "runs=0 leaves nothing to compute; choose 1 or more"),
        ({"draws_per_cell": 0}, "draws_per_cell=0 leaves nothing to compute; choose 1 or more"),
        ({"neighbours": 0}, "neighbours=0 leaves nothing to compute; choose 1 or more"),
        ({"pom_epochs": 0}, "pom_epochs=0 leaves nothing to compute; choose 1 or more"),
        ({"permutations": -5}, "permutations=-5 counts nothing; choose 0 or more"),
        ({"null_runs": -1}, "null_runs=-1 counts nothing; choose 0 or more"),
        ({"study": "utilty"}, "study='utilty' is not known; did you mean utility?"),
        ({"representations": ("points",)}, "representation 'points' cannot be asked for by name"),
        ({"representations": ("file:a-0",)}, "representation 'file:a-0' cannot be asked for by name"),
        ({"table": "curated", "table_path": "/typo"}, "table_path='/typo' is no folder"),
        ({"table_path": str(tmp_path)}, "with table=embedded: the folder is read for curated, broader, nonoverlap"),
        (
            {"table": "curated", "table_path": str(tmp_path)},
            f"no table at {tmp_path / 'curated_GS_LF_merged_4983.csv'}",
        ),
    ):
        with pytest.raises(UserError) as caught:
            SWEEP.plan(replace(PRESETS["audit"], **change))
        assert line in str(caught.value)
    bare = tmp_path / "bare.csv"
    bare.write_text("smiles\nCO\nCCO\nCCCO\n")
    for change, needs in (({}, "pom_0"), ({"study": "utility", "representations": ("bits_r4",)}, "the utility study")):
        with pytest.raises(UserError, match=f"has 0 label columns and {needs} needs them; choose"):
            SWEEP.plan(replace(PRESETS["audit"], table=str(bare), **change))
    empty = tmp_path / "t.csv"
    empty.write_text("name\nx\n")
    with pytest.raises(UserError, match="smiles"):
        SWEEP.plan(replace(PRESETS["audit"], table=str(empty)))
