"""One stand-in codec per ledger: nodes that would train different ones compare architectures on the same tokens."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data.melvq
from data.melvq import MelVQSpec
from sweeps.codec import corpora, own_codec
from sweeps.codec.cells import Study
from sweeps.codec.presets import PRESETS
from sweeps.codec.sweep import SWEEP
from sweeps.codec.tokens import fingerprint, open_source, tokens_folder
from sweeps.core.cells import UserError
from sweeps.ledger.storage import Store
from tests.sweeps.codec.test_codec_data import layout, quiet, study_at

TRAIN = data.melvq.train


def machine(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node with a cache of its own, whose processor rounds as no other does."""

    def train(waves: Iterable[Any], spec: MelVQSpec, **options: Any) -> Any:
        return TRAIN((w * np.float32(1 + 1e-3 * number) for w in waves), spec, **options)

    monkeypatch.setattr(data.melvq, "train", train)
    monkeypatch.setenv("PLUMBLINE_CACHE", str(folder / f"cache{number}"))
    for known in (corpora.listed, corpora.with_content, corpora.recorded_origin):
        known.cache_clear()


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return study_at(layout(tmp_path / "audio"))


@pytest.mark.parametrize("where", ["memory://{}", "{}"])
def test_every_node_codes_with_the_ledgers_codec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: Study, where: str
) -> None:
    ledger = Store(where.format(tmp_path / "ledger" if where == "{}" else uuid.uuid4().hex))
    cell, codecs, prints = SWEEP.plan(study)[0], set(), set()
    for number in (1, 2, 1):
        machine(number, tmp_path, monkeypatch)
        source = open_source(study, "cpu", quiet, ledger)
        codecs.add((source.codec.weights_hash, source.tokens.manifest["codec"]["weights_hash"]))
        prints.add(fingerprint(cell, study))
    assert len(codecs) == len(prints) == 1
    machine(2, tmp_path, monkeypatch)
    alone = open_source(study, "cpu", quiet)  # another ledger, or none: tokens of both codecs are kept apart
    assert alone.codec.weights_hash not in {own for own, _ in codecs}
    assert open_source(study, "cpu", quiet, ledger).tokens.computed == 0


def test_synthetic_speech_has_one_codec_per_ledger_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, ledger = replace(PRESETS["local"], corpus_clips=12), Store(f"memory://{uuid.uuid4().hex}")
    small = MelVQSpec(n_mels=8, n_codebooks=2, codebook_size=16)
    monkeypatch.setattr(type(study), "melvq", lambda _study: small)
    found = set()
    for number in (1, 2):
        machine(number, tmp_path, monkeypatch)
        found.add(open_source(study, "cpu", quiet, ledger).codec.weights_hash)
    assert len(found) == 1


def test_the_first_codec_stays_when_two_nodes_train_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: Study
) -> None:
    ledger = Store(f"memory://{uuid.uuid4().hex}")
    machine(1, tmp_path, monkeypatch)
    publish = own_codec._publish

    def late(store: Store, name: str, own: Path) -> None:
        other = tmp_path / "other.npz"
        TRAIN(iter([np.random.default_rng(1).standard_normal(9_000, np.float32)]), study.melvq())[0].save(other)
        publish(store, name, other)
        publish(store, name, own)

    monkeypatch.setattr(own_codec, "_publish", late)
    first = open_source(study, "cpu", quiet, ledger).codec.weights_hash
    monkeypatch.setattr(own_codec, "_publish", publish)
    machine(2, tmp_path, monkeypatch)
    assert open_source(study, "cpu", quiet, ledger).codec.weights_hash == first


def test_a_damaged_codec_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: Study) -> None:
    ledger = Store(f"memory://{uuid.uuid4().hex}")
    machine(1, tmp_path, monkeypatch)
    open_source(study, "cpu", quiet, ledger)
    machine(2, tmp_path, monkeypatch)
    name = tokens_folder(study).name
    (file,) = (n for n in ledger.names("_codecs") if n.endswith(".npz"))
    whole = ledger.read(f"_codecs/{file}")
    ledger.replace(f"_codecs/{file}", whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"codec of this ledger is damaged: .*has other bytes") as caught:
        open_source(study, "cpu", quiet, ledger)
    assert "\n" not in str(caught.value)
    ledger.remove_file(f"_codecs/{file}")
    with pytest.raises(UserError, match="is missing"):
        open_source(study, "cpu", quiet, ledger)
    for pointer in (b"[]", b"{}", b'{"size": 1, "sha256": "../../../etc/x"}', b'{"size": "1", "sha256": "ab"}'):
        ledger.replace(f"_codecs/{name}.json", pointer)
        with pytest.raises(UserError, match="is not what a launch writes"):
            open_source(study, "cpu", quiet, ledger)
