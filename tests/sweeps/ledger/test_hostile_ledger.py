"""A ledger from somebody else makes its reader neither write nor read files outside of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sweeps.core.cells import UserError
from sweeps.core.names import checked
from sweeps.ledger.ledger import Ledger
from sweeps.ledger.published import file_of
from sweeps.ledger.storage import Store
from tests.sweeps.ledger.test_publication import Point, ledger_of

NAMES = ("/etc/x", "../x", "a/../../x", "a//b", "a/./b", "", ".", "..", "a\\b", "a\0b", "a\nb", "C:\\x", "a/")


@pytest.mark.parametrize("name", NAMES)
def test_one_rule_for_names(name: str) -> None:
    with pytest.raises(UserError, match="could lead out of"):
        checked(name, "here")


@pytest.mark.parametrize("name", ["rows.parquet", "sae/sae_weights.safetensors", "sample-1.wav", "größe ab.png", "..a"])
def test_plain_names_pass(name: str) -> None:
    assert checked(name, "here") == name


def rewritten(ledger: Ledger, key: str, name: str) -> None:
    """As a ledger of an older program: no facts in the marker, a hostile name among the files."""
    meta = dict(ledger.read(key).meta) | {"files": {name: 4, "rows.parquet": 1}}
    ledger.store.replace(f"{key}/cell.json", json.dumps(meta).encode())
    ledger.store.replace(f"{key}/_PUBLISHED", b"")


@pytest.mark.parametrize("name", ["/tmp/victim", "../../victim", "a//../victim"])
def test_no_reader_accepts_a_name_that_leads_out(tmp_path: Path, name: str) -> None:
    ledger = ledger_of(str(tmp_path), 1)
    key = Point(x=1).key
    rewritten(ledger, key, name)
    fresh = Ledger(str(tmp_path), "points", "1")
    for read in (lambda: fresh.read(key), lambda: fresh.file(key, name), lambda: fresh.compact(fresh.done())):
        with pytest.raises(UserError, match=rf"could lead out of cell {key}"):
            read()


def test_links_that_leave_the_cell_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("private")
    ledger = ledger_of(str(tmp_path / "ledger"), 1)
    key = Point(x=1).key
    rewritten(ledger, key, "notes.txt")
    os.symlink(secret, ledger.store.path(f"{key}/notes.txt"))
    cell = Ledger(str(tmp_path / "ledger"), "points", "1").read(key)
    with pytest.raises(UserError, match=r"notes.txt is a link that leads out of"):
        file_of(cell, "notes.txt")
    inner = Store(str(tmp_path / "ledger" / "points" / "1"))
    with pytest.raises(UserError, match="is a link that leads out of"):
        inner.read(f"{key}/notes.txt")


def test_a_link_to_a_folder_elsewhere_is_refused_and_one_within_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "f").write_text("private")
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "f").write_text("fine")
    os.symlink(tmp_path / "elsewhere", root / "out")
    os.symlink(root / "a" / "f", root / "a" / "same")
    store = Store(str(root))
    assert store.read("a/same") == b"fine"
    with pytest.raises(UserError, match="is a link that leads out of"):
        store.read("out/f")
