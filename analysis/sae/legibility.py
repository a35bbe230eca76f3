"""How legible an SAE's features are: sparse probes for labels of tokens, compared with probes on activations.

A label is a class of tokens against the other classes of its kind (`data.token_labels` has the classes; here they are
numbers with names). Tokens are drawn so that half of them have the label, in training documents and in test documents
separately: chance is an accuracy of 0.5 and a code length of 1 bit per label. The sparse probe is SAEBench's (Karvonen
et al. 2025): the k features whose means over training tokens with and without the label differ most, and a logistic
regression on them. The code length is prequential (Voita & Titov 2020, "Information-theoretic probing with minimum
description length"): documents are coded one block after another, each by a probe trained on the blocks before.

Shape suffixes: N tokens drawn for a label, A tokens drawn for any label, T tokens of the text, D probed columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.sparse import csr_array
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from analysis.sae.columns import PROBED_K

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

MOST = 1000
"""Tokens with a label, and without it, that are drawn on each side of the split; a label with fewer gives fewer."""

LEAST = 32
"""With fewer tokens of either kind on either side a label is not measured."""

BLOCKS = 6
"""The code's blocks end at about 1/64, 1/32 … 1/2 of the labels and at their end, each at a document's end."""

UNIFORM = 0.01
"""Share of the uniform code in every prediction of a label, so that none costs more than 7.7 bits."""


@dataclass(frozen=True)
class Task:
    """One label with the tokens drawn for it, by document; `reason` says why it cannot be measured, then nothing is
    drawn.

    token_N: places in the text. has_N: whether a token has the label. train_N: whether its document is of the training
    half. document_N: numbers that follow the order in which documents are coded.
    """

    name: str
    token_N: Ints
    has_N: Bools
    train_N: Bools
    document_N: Ints
    reason: str = ""

    def documents(self, *, train: bool) -> int:
        return len(np.unique(self.document_N[self.train_N == train]))


def tasks(class_T: npt.ArrayLike, document_T: npt.ArrayLike, kinds: Mapping[str, Sequence[str]]) -> list[Task]:
    """The labels of a text, with tokens drawn for each.

    Args:
        class_T: a place in the classes, which are those of all kinds in order, or −1 for tokens that are left out.
        document_T: each token's document, by a number that is unrelated to its content (a hash).
        kinds: classes by kind, e.g. {"Python": ("keyword", …)}: a class is told from the others of its kind, and the
            second kind, under its own name, from the first.
    """
    class_T, document_T = np.asarray(class_T, np.int64), np.asarray(document_T, np.int64)
    train_T, order_T = _halves(class_T >= 0, document_T)
    names = [name for some in kinds.values() for name in some]
    groups: list[tuple[str, list[int], list[int]]] = []
    members = {kind: [names.index(name) for name in some] for kind, some in kinds.items()}
    for own in members.values():
        groups += [(names[i], [i], [j for j in own if j != i]) for i in own]
    first, *others = members
    groups += [(kind, members[kind], members[first]) for kind in others]
    return [
        _draw(name, np.isin(class_T, have), np.isin(class_T, lack), train_T, order_T, seed)
        for seed, (name, have, lack) in enumerate(groups)
    ]


def _halves(counted_T: Bools, document_T: Ints) -> tuple[Bools, Ints]:
    """(training documents: by number until half of the counted tokens are theirs; a document's place in the code's
    order, from the one with the fewest counted tokens on, so that the first blocks are small)."""
    numbers, place_T = np.unique(document_T, return_inverse=True)
    counts = np.bincount(place_T[counted_T], minlength=len(numbers))
    before = np.cumsum(counts) - counts
    train = before + counts / 2 <= counts.sum() / 2
    rank = np.empty(len(numbers), np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(numbers))
    return train[place_T], rank[place_T]


def _draw(name: str, has_T: Bools, lacks_T: Bools, train_T: Bools, order_T: Ints, seed: int) -> Task:
    draws = np.random.default_rng(seed)
    parts: list[tuple[Ints, bool, bool]] = []
    for train in (True, False):
        found = {flag: np.flatnonzero(of_T & (train_T == train)) for flag, of_T in ((True, has_T), (False, lacks_T))}
        n = min(MOST, *map(len, found.values()))
        if n < LEAST:
            fewer = min(found, key=lambda flag: len(found[flag]))
            what = f"{len(found[fewer])} tokens {'with' if fewer else 'without'} it in"
            reason = f"{what} {'training' if train else 'test'} documents; needs {LEAST}: more eval_sequences"
            nothing = np.empty(0, np.int64)
            return Task(name, nothing, nothing.astype(bool), nothing.astype(bool), nothing, reason)
        parts += [(draws.choice(of, n, replace=False), flag, train) for flag, of in found.items()]
    token_N = np.concatenate([token for token, _, _ in parts])
    has_N, train_N = (np.repeat([p[i] for p in parts], [len(p[0]) for p in parts]) for i in (1, 2))
    order = np.lexsort((token_N, order_T[token_N]))
    return Task(name, token_N[order], has_N[order], train_N[order], order_T[token_N][order])


def drawn_tokens(of: Sequence[Task]) -> Ints:
    """[A]: the places in the text of all tokens that some label has drawn, ascending."""
    return np.unique(np.concatenate([np.empty(0, np.int64), *(task.token_N for task in of)]))


def sparse_probes(of: Sequence[Task], drawn_A: Ints, features_AD: csr_array) -> pd.DataFrame:
    """One row per task: accuracies `k1`, `k2`, `k5` on test documents, and `mdl`, bits per label with the most
    features. NaN where a task is not measured.

    Args:
        of: the tasks of the text.
        drawn_A: `drawn_tokens` of them.
        features_AD: the SAE's activations at these tokens.
    """
    most = max(PROBED_K)
    rows: list[dict[str, float]] = []
    for task in of:
        if task.reason:
            rows.append(dict.fromkeys([*(f"k{k}" for k in PROBED_K), "mdl"], float("nan")))
            continue
        x_ND = features_AD[np.searchsorted(drawn_A, task.token_N)]
        ranked = _by_mean_difference(x_ND[task.train_N], task.has_N[task.train_N], most)
        row = {f"k{k}": _accuracy(_columns(x_ND, ranked[:k]), task) for k in PROBED_K}
        rows.append(row | {"mdl": code_length(x_ND, task.has_N, task.document_N, most)})
    return pd.DataFrame(rows, index=pd.Index([task.name for task in of], name="label"))


def dense_probes(of: Sequence[Task], drawn_A: Ints, a_AD: Floats) -> pd.DataFrame:
    """`sparse_probes` of activations with all their columns: `dense` and `mdl_dense`."""
    rows: list[dict[str, float]] = []
    for task in of:
        if task.reason:
            rows.append(dict.fromkeys(("dense", "mdl_dense"), float("nan")))
            continue
        x_ND = a_AD[np.searchsorted(drawn_A, task.token_N)]
        rows.append({"dense": _accuracy(x_ND, task), "mdl_dense": code_length(x_ND, task.has_N, task.document_N)})
    return pd.DataFrame(rows, index=pd.Index([task.name for task in of], name="label"))


def code_length(x_ND: Floats | csr_array, has_N: Bools, document_N: Ints, most: int = 0) -> float:
    """Bits per label of a prequential code: below 1 where the columns tell of the label.

    Args:
        x_ND: the tokens in the order of their documents.
        has_N: their labels.
        document_N: ascending.
        most: columns that a block's probe takes of a sparse matrix, chosen by what was coded before; a dense one gives
            all its columns.
    """
    ends = _block_ends(document_N)
    bits = float(ends[0])  # the first block by the uniform code
    for start, end in pairwise(ends):
        seen, coded = slice(0, start), slice(start, end)
        if has_N[seen].all() or not has_N[seen].any():
            bits += end - start
            continue
        known_ND, next_ND = x_ND[seen], x_ND[coded]
        if isinstance(known_ND, csr_array):
            columns = _by_mean_difference(known_ND, has_N[seen], most)
            known_ND, next_ND = _columns(known_ND, columns), _columns(next_ND, columns)
        p_N = _Probe(known_ND, has_N[seen]).probability(next_ND)
        own_N = (1 - UNIFORM) * np.where(has_N[coded], p_N, 1 - p_N) + UNIFORM / 2
        bits -= float(np.log2(own_N).sum())
    return bits / len(has_N)


def _block_ends(document_N: Ints) -> list[int]:
    """Ends of the blocks: of the first documents that reach 1/64, 1/32, … of the tokens, the last at their end."""
    last_of_documents = np.append(np.flatnonzero(np.diff(document_N)) + 1, len(document_N))
    wanted = len(document_N) / 2.0 ** np.arange(BLOCKS, -1, -1)
    return sorted({int(last_of_documents[np.searchsorted(last_of_documents, n)]) for n in wanted})


def _by_mean_difference(x_ND: csr_array, has_N: Bools, most: int) -> Ints:
    """The columns whose means with and without the label differ most, the largest difference first."""
    with_D, without_D = (np.asarray(x_ND[of_N].mean(axis=0)).ravel() for of_N in (has_N, ~has_N))
    return np.argsort(-np.abs(with_D - without_D), kind="stable")[:most]


def _columns(x_ND: csr_array, columns: Ints) -> Floats:
    return np.asarray(x_ND[:, columns].todense(), np.float64)


def _accuracy(x_ND: Floats, task: Task) -> float:
    probe = _Probe(x_ND[task.train_N], task.has_N[task.train_N])
    return float(((probe.probability(x_ND[~task.train_N]) > 0.5) == task.has_N[~task.train_N]).mean())


class _Probe:
    """Logistic regression on columns of unit variance, with scikit-learn's penalty; one thread, so that its bits depend
    on nothing else."""

    def __init__(self, x_ND: Floats, has_N: Bools) -> None:
        x_ND = np.asarray(x_ND, np.float64)
        self._mean_D, deviation_D = x_ND.mean(axis=0), x_ND.std(axis=0)
        self._scale_D = np.where(deviation_D > 0, deviation_D, 1.0)
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that stops early is a probe
            self._fitted = LogisticRegression(max_iter=200).fit(self._scaled(x_ND), has_N)

    def _scaled(self, x_ND: Floats) -> Floats:
        return (x_ND - self._mean_D) / self._scale_D

    def probability(self, x_ND: Floats) -> Floats:
        """Of having the label, [N]."""
        with threadpool_limits(1):
            return np.asarray(self._fitted.predict_proba(self._scaled(x_ND))[:, 1])
