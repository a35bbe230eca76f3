"""Sparse probes and code lengths: planted features, scrambled labels, closed forms."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array

from analysis.sae import legibility
from analysis.sae.columns import PROBED_K
from analysis.sae.legibility import Task, code_length, dense_probes, drawn_tokens, sparse_probes, tasks

KINDS = {"python": ("keyword", "name", "string"), "documentation": ("heading", "prose")}
NAMES = [name for some in KINDS.values() for name in some]
N, DOCUMENTS, D_SAE = 12_000, 80, 60


@pytest.fixture(scope="module")
def text() -> tuple[np.ndarray, np.ndarray]:
    """(class, document) of each token; the first 56 documents are Python."""
    rng = np.random.default_rng(0)
    place_T = np.sort(rng.integers(0, DOCUMENTS, N))
    class_T = np.where(place_T < 56, rng.integers(0, 3, N), rng.integers(3, 5, N))
    class_T[rng.random(N) < 0.1] = -1
    return class_T, rng.integers(0, 2**62, DOCUMENTS)[place_T]


def noise(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Features of an SAE that fire at random."""
    return np.abs(rng.standard_normal((rows, D_SAE))) * (rng.random((rows, D_SAE)) < 0.1)


def with_labels(class_T: np.ndarray) -> np.ndarray:
    """One column for each label: 3 where a token has it."""
    kinds = [np.isin(class_T, [3, 4])]
    return 3.0 * np.stack([*(class_T == i for i in range(5)), *kinds], axis=1)


def probed(asked: list[Task], x_TD: np.ndarray) -> pd.DataFrame:
    drawn_A = drawn_tokens(asked)
    return sparse_probes(asked, drawn_A, csr_array(x_TD[drawn_A])).join(dense_probes(asked, drawn_A, x_TD[drawn_A]))


def test_a_feature_that_is_the_label_is_perfectly_legible(text: tuple[np.ndarray, np.ndarray]) -> None:
    rng = np.random.default_rng(1)
    asked = tasks(*text, KINDS)
    assert [task.name for task in asked] == [*NAMES, "documentation"]
    x_TD = noise(rng, N)
    x_TD[:, 40:46] = with_labels(text[0])
    found = probed(asked, x_TD)
    assert (found[["k1", "k2", "k5", "dense"]] == 1.0).all(axis=None)
    assert (found["mdl"] < 0.08).all()
    assert (found["mdl_dense"] < 0.15).all()


def test_scrambled_labels_give_chance_and_cost_at_least_their_entropy(text: tuple[np.ndarray, np.ndarray]) -> None:
    """The tokens' labels are drawn half and half, so that chance is 0.5 and the entropy 1 bit."""
    rng = np.random.default_rng(2)
    asked = tasks(*text, KINDS)
    x_TD = noise(rng, N)
    scrambled = with_labels(rng.permutation(text[0]))
    x_TD[:, 40:46] = scrambled
    found = probed(asked, x_TD)
    tests = min(int((~task.train_N).sum()) for task in asked)
    assert (found[["k1", "k2", "k5", "dense"]] - 0.5).abs().max(axis=None) < 4.5 * 0.5 / math.sqrt(tests)
    assert (found[["mdl", "mdl_dense"]] >= 1.0).all(axis=None)
    assert (found["mdl"] < 1.1).all()


def test_two_features_together_need_k_2(text: tuple[np.ndarray, np.ndarray]) -> None:
    """Each fires on half of the label's tokens: one of them gives 3/4, both give all, and one more adds nothing."""
    rng = np.random.default_rng(3)
    class_T, document_T = text
    half_T = rng.random(N) < 0.5
    x_TD = np.zeros((N, D_SAE))
    x_TD[:, 7], x_TD[:, 9] = (class_T == 0) & half_T, (class_T == 0) & ~half_T
    found = probed(tasks(class_T, document_T, KINDS), x_TD).loc["keyword"]
    assert found["k1"] == pytest.approx(0.75, abs=0.03)
    assert found["k2"] == found["k5"] == found["dense"] == 1.0
    assert PROBED_K == (1, 2, 5)


def test_features_are_chosen_on_training_documents_alone(text: tuple[np.ndarray, np.ndarray]) -> None:
    """A feature that is the label in test documents and fires for nothing in training documents helps no probe."""
    class_T, document_T = text
    asked = tasks(class_T, document_T, KINDS)
    train = {int(document_T[t]) for task in asked for t, flag in zip(task.token_N, task.train_N, strict=True) if flag}
    test = {
        int(document_T[t]) for task in asked for t, flag in zip(task.token_N, task.train_N, strict=True) if not flag
    }
    assert not train & test
    assert min(len(train), len(test)) > 20
    x_TD = noise(np.random.default_rng(4), N)
    x_TD[:, 40:46] = with_labels(class_T) * np.isin(document_T, list(test))[:, None]
    found = probed(asked, x_TD)
    assert (found[["k1", "k2", "k5"]] < 0.62).all(axis=None)


def test_tokens_are_drawn_half_with_the_label_from_both_halves_of_the_documents(
    text: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(legibility, "MOST", 300)
    class_T, document_T = text
    for task in tasks(class_T, document_T, KINDS):
        for train in (True, False):
            has = task.has_N[task.train_N == train]
            assert has.sum() * 2 == len(has) == 600
        own = {i for i, name in enumerate(NAMES) if name == task.name} or {3, 4}
        assert set(class_T[task.token_N[task.has_N]]) == own
        kind = {0, 1, 2} if task.name in KINDS["python"] or task.name == "documentation" else {3, 4}
        assert set(class_T[task.token_N[~task.has_N]]) == kind - own
        assert (np.diff(task.document_N) >= 0).all()
        assert len(set(task.token_N.tolist())) == len(task.token_N)
    counted = class_T >= 0
    sides = [counted & np.isin(document_T, np.unique(document_T[task.token_N[task.train_N]])) for task in [task]]
    assert sides[0].sum() <= counted.sum() * 0.6
    again = tasks(class_T, document_T, KINDS)[0]
    np.testing.assert_array_equal(again.token_N, tasks(class_T, document_T, KINDS)[0].token_N)


def test_a_label_with_too_few_tokens_has_a_reason_and_no_number(text: tuple[np.ndarray, np.ndarray]) -> None:
    class_T, document_T = text
    rare_T = np.where((class_T == 0) & (np.arange(N) % 80 > 0), -1, class_T)
    asked = tasks(np.where(rare_T > 2, -1, rare_T), document_T, KINDS)
    assert "tokens with it in" in asked[0].reason
    assert "needs 32: more eval_sequences" in asked[0].reason
    assert asked[1].reason == ""  # names against keywords and strings
    assert all(task.reason for task in asked[3:])
    found = probed(asked, noise(np.random.default_rng(5), N))
    assert found.isna().all(axis=1).tolist() == [bool(task.reason) for task in asked]
    nothing = tasks(np.full(N, -1), document_T, KINDS)
    assert all(task.reason.startswith("0 tokens") for task in nothing)
    assert probed(nothing, noise(np.random.default_rng(5), N)).isna().all(axis=None)


def test_the_code_length_of_a_column_without_news_is_one_bit() -> None:
    """Nothing to learn from a constant: the first block is uniform, later ones cost what the label's share costs."""
    has_N, document_N = np.arange(640) % 2 == 0, np.repeat(np.arange(64), 10)
    assert code_length(np.ones((640, 1)), has_N, document_N) == pytest.approx(1.0, abs=1e-9)
    assert code_length(np.ones((640, 1)), has_N, np.zeros(640, int)) == 1.0  # one document: never anything to learn on
    perfect = has_N[:, None].astype(float)
    assert code_length(perfect, has_N, document_N) == pytest.approx(
        code_length(csr_array(perfect), has_N, document_N, 5), abs=1e-12
    )


def test_the_code_is_prequential(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is coded by what came before: blocks end at documents, and the bits are those of these probes."""
    seen: list[tuple[int, int]] = []

    class Half:
        def __init__(self, x_ND: np.ndarray, has_N: np.ndarray) -> None:
            self.n = len(has_N)

        def probability(self, x_ND: np.ndarray) -> np.ndarray:
            seen.append((self.n, len(x_ND)))
            return np.full(len(x_ND), 0.25)

    monkeypatch.setattr(legibility, "_Probe", Half)
    document_N, has_N = np.repeat(np.arange(10), 10), np.arange(100) % 4 == 0
    bits = code_length(np.zeros((100, 1)), has_N, document_N)
    assert seen == [(10, 10), (20, 10), (30, 20), (50, 50)]
    share = legibility.UNIFORM
    later = has_N[10:]
    costs = [-math.log2((1 - share) * p + share / 2) for p in (0.25, 0.75)]
    wanted = (10 + later.sum() * costs[0] + (~later).sum() * costs[1]) / 100
    assert bits == pytest.approx(wanted, abs=1e-12)
