"""The product's own odor model: message passing with bond features, a 256-d embedding, multilabel odor heads.

It stands in where no OpenPOM embedding is given, and is reported as "own model", never as OpenPOM. The layer is
GINE (Hu et al. 2020, "Strategies for Pre-training Graph Neural Networks", after GIN, Xu et al. 2019):

    m_i = Σ_{j ∈ N(i)} relu(h_j + W_l·bond_ij),    h_i ← h_i + relu(norm(MLP_l(h_i + m_i)))

Shapes: N molecules, A atoms of a batch, S neighbour slots per atom, F atom features, T bond types, H hidden width,
E embedding dimensions (256), L labels (`h_AH`, `slots_AS`, `embedding_NE`, `labels_NL`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from iterstrat.ml_stratifiers import MultilabelStratifiedShuffleSplit
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from models.cpu.adam import AdamW
from models.cpu.threads import torch_threads
from models.odor.graphs import GraphBatch, Graphs, neighbour_sum

EMBEDDING = 256
# of AdamW; fixed, because a member is identified by its table, number and epochs only
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 2e-2


@dataclass(frozen=True, kw_only=True)
class Split:
    """Row numbers of the three parts; every row is in exactly one."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Member:
    """One trained member of the ensemble.

    `net` has the chosen weights, in evaluation mode; `embedding_NE` float32 holds all N molecules in input order;
    `auroc_val` chose the epoch, `auroc_test` was read once, after that choice. `labels_scored` counts the labels with
    both classes in the test split, over which `auroc_test` is the mean.
    """

    net: OdorNet
    embedding_NE: np.ndarray
    auroc_test: float
    auroc_val: float
    labels_scored: int
    epoch: int
    epochs: int


class OdorNet(nn.Module):
    """GINE layers, sum and mean readout, a 256-d penultimate layer (the embedding), one logit per label."""

    def __init__(self, atom_features: int, bond_features: int, labels: int, hidden: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.atoms = nn.Linear(atom_features, hidden)
        self.bonds = nn.ModuleList(nn.Linear(bond_features, hidden) for _ in range(layers))
        self.mixers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(hidden, hidden, bias=False),
                nn.BatchNorm1d(hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden, bias=False),
                nn.BatchNorm1d(hidden),
            )
            for _ in range(layers)
        )
        self.readout = nn.Sequential(
            nn.Linear(2 * hidden, EMBEDDING, bias=False),
            nn.BatchNorm1d(EMBEDDING),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(EMBEDDING, EMBEDDING),
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout(0.3), nn.Linear(EMBEDDING, labels))

    def embed(self, graph: GraphBatch) -> Tensor:
        """Penultimate layer before its nonlinearity: [N, 256]."""
        h_AH = self.atoms(graph.atoms)
        for bond, mixer in zip(self.bonds, self.mixers, strict=True):
            message_AH = neighbour_sum(h_AH, bond(graph.bond_features), graph)
            h_AH = h_AH + torch.relu(mixer(h_AH + message_AH))
        total_NH = torch.segment_reduce(h_AH, "sum", lengths=graph.sizes, axis=0)
        mean_NH = total_NH / graph.sizes[:, None]
        return self.readout(torch.cat([total_NH / 10, mean_NH], dim=1))

    def forward(self, graph: GraphBatch) -> Tensor:
        return self.head(self.embed(graph))


def split(labels_NL: np.ndarray, seed: int = 0, val: float = 0.1, test: float = 0.1) -> Split:
    """Multilabel-stratified split (Sechidis et al. 2011): `test`, then `val` of the rest, both as shares of N.

    Raises:
        ValueError: shares outside (0, 1), or a part that would be empty.
    """
    if not (val > 0 and test > 0 and val + test < 1):
        raise ValueError(f"val={val}, test={test}; choose val > 0, test > 0 and val + test < 1")
    n = len(labels_NL)
    if n * min(val, test, 1 - val - test) < 1:
        raise ValueError(f"{n} molecules are too few for val={val}, test={test}; every part needs at least one row")

    def cut(rows: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
        cutter = MultilabelStratifiedShuffleSplit(n_splits=1, test_size=share, random_state=seed)
        kept, taken = next(cutter.split(rows, labels_NL[rows]))
        return rows[kept], rows[taken]

    rest, test_rows = cut(np.arange(n), test)
    train_rows, val_rows = cut(rest, val / (1 - test))
    return Split(train=train_rows, val=val_rows, test=test_rows)


def macro_auroc(labels_NL: np.ndarray, scores_NL: np.ndarray) -> tuple[float, int]:
    """Mean area under the ROC curve over the labels that have both classes, and how many those are.

    Raises:
        ValueError: no label has both classes.
    """
    positives_L = labels_NL.sum(axis=0)
    usable = (positives_L > 0) & (positives_L < len(labels_NL))
    if not usable.any():
        raise ValueError(f"0 of {labels_NL.shape[1]} labels have both classes in {len(labels_NL)} rows; use more rows")
    return float(roc_auc_score(labels_NL[:, usable], scores_NL[:, usable], average="macro")), int(usable.sum())


def default_batch_size(molecules: int) -> int:
    """16 … 128 molecules, so that an epoch over four fifths of the table has 30 steps or more where it can."""
    return min(128, max(16, molecules * 4 // 5 // 30))


def train_member(
    smiles: Sequence[str],
    labels_NL: np.ndarray,
    seed: int,
    *,
    parts: Split | None = None,
    epochs: int = 40,
    batch_size: int | None = None,
    threads: int = 1,
    progress: Callable[[int, float], None] | None = None,
) -> Member:
    """Trains one member; the same seed and thread count give the same bits.

    `seed` sets weights, dropout and batch order; `parts` defaults to `split(labels_NL)`, the same for every seed.
    The weights scored are an exponential moving average of about the last two epochs. The validation split alone
    chooses the epoch; the test split is scored once, at the end. `batch_size` defaults to 16 … 128 molecules, so
    that an epoch has 30 steps or more where the table allows it. `progress` is called with (epoch, auroc_val).

    Raises:
        ValueError: labels that are not 0/1 [N, L], a label of one class, fewer epochs than one, or bad SMILES.
    """
    labels_NL = _checked(smiles, labels_NL, epochs)
    parts = parts or split(labels_NL)
    graphs = Graphs(smiles)
    size = batch_size or default_batch_size(len(smiles))
    target_NL = torch.from_numpy(labels_NL.astype(np.float32))
    with torch_threads(threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        net = OdorNet(graphs.atoms.shape[1], graphs.bond_features.shape[1], labels_NL.shape[1])
        training = _Training(net, epochs, steps=epochs * max(1, len(parts.train) // size))
        best = (-1.0, 0, training.average.state())
        for epoch in range(1, epochs + 1):
            for rows in _batches(parts.train, size, rng):
                training.step(graphs.batch(rows), target_NL[rows])
            if 2 * epoch > epochs or epoch == epochs:
                score = macro_auroc(labels_NL[parts.val], _predict(training.average.net, graphs, parts.val))[0]
                if progress:
                    progress(epoch, score)
                if score > best[0]:
                    best = (score, epoch, training.average.state())
        chosen = training.average.net
        chosen.load_state_dict(best[2])
        test, scored = macro_auroc(labels_NL[parts.test], _predict(chosen, graphs, parts.test))
        return Member(
            net=chosen,
            embedding_NE=_predict(chosen, graphs, np.arange(len(graphs)), embed=True),
            auroc_test=test,
            auroc_val=best[0],
            labels_scored=scored,
            epoch=best[1],
            epochs=epochs,
        )


class _Training:
    """AdamW with a one-cycle rate, and the moving average of the weights."""

    def __init__(self, net: OdorNet, epochs: int, steps: int) -> None:
        self.net = net
        self.optimiser = AdamW(net.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, _LEARNING_RATE, total_steps=steps)
        self.average = _Average(net, decay=1 - epochs / (2 * steps))

    def step(self, graph: GraphBatch, target_BL: Tensor) -> None:
        loss = nn.functional.binary_cross_entropy_with_logits(self.net(graph), target_BL)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        self.average.update(self.net)


def embed(net: OdorNet, smiles: Sequence[str], threads: int = 1) -> np.ndarray:
    """Embedding of molecules by a member's `net`, whether it was trained on them or not: float32 [N, E].

    The features hold no stereochemistry, so stereo variants of a molecule get the same embedding.

    Raises:
        ValueError: bad SMILES.
    """
    with torch_threads(threads):
        return _predict(net, Graphs(smiles), np.arange(len(smiles)), embed=True)


class _Average:
    """Exponential moving average of a network: parameters averaged, counters and statistics of BatchNorm too."""

    def __init__(self, net: OdorNet, decay: float) -> None:
        self.net = copy.deepcopy(net).eval()
        self.decay = decay

    def update(self, net: OdorNet) -> None:
        with torch.no_grad():
            for mean, value in zip(self.net.state_dict().values(), net.state_dict().values(), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(value, 1 - self.decay)
                else:
                    mean.copy_(value)

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.net.state_dict().items()}


def _batches(rows: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Shuffled full batches; one smaller batch when there are fewer rows than `size`."""
    order = rng.permutation(rows)
    for first in range(0, max(1, len(order) // size) * size, size):
        yield order[first : first + size]


def _predict(net: OdorNet, graphs: Graphs, rows: np.ndarray, embed: bool = False) -> np.ndarray:
    with torch.no_grad():
        call = net.embed if embed else net
        parts = [call(graphs.batch(rows[i : i + 512])) for i in range(0, len(rows), 512)]
    return torch.cat(parts).numpy()


def _checked(smiles: Sequence[str], labels_NL: np.ndarray, epochs: int) -> np.ndarray:
    labels_NL = np.asarray(labels_NL)
    if epochs < 1:
        raise ValueError(f"epochs={epochs}; choose epochs >= 1")
    if labels_NL.ndim != 2 or len(labels_NL) != len(smiles) or not np.isin(labels_NL, (0, 1)).all():
        raise ValueError(f"labels of shape {labels_NL.shape} for {len(smiles)} molecules; give a 0/1 matrix [N, L]")
    single = np.flatnonzero(labels_NL.min(axis=0) == labels_NL.max(axis=0))
    if single.size:
        raise ValueError(
            f"{single.size} of {labels_NL.shape[1]} labels have one class only (the first is column {single[0]}); "
            f"drop such labels, they cannot be learned or scored"
        )
    return labels_NL.astype(np.uint8)
