"""Trains a bank of critics on pairs of views, and reads each where its smoothed test estimate is largest.

Shape suffixes: M members, T tokens, N pairs of a batch, D width of a view, K largest k_z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.information.critics import CriticBank, info_nce
from models.information.settings import CriticSettings

TellLine = Callable[[str], None]


@dataclass(frozen=True)
class Pairs:
    """Two views of the same tokens: x_TD and y_TD with equal numbers of rows, float32."""

    x_TD: Tensor
    y_TD: Tensor

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.x_TD[rows], self.y_TD[rows]

    def __len__(self) -> int:
        return len(self.x_TD)

    @property
    def widths(self) -> tuple[int, int]:
        return self.x_TD.shape[1], self.y_TD.shape[1]


@dataclass
class Trained:
    """One member at the maximum of its smoothed test estimate, in nats; `curve`: (step, test estimate)."""

    k: int
    estimate: float
    step: int
    weights: dict[str, Tensor] = field(repr=False)
    curve: list[tuple[int, float]]


def batches(train_T: Tensor, settings: CriticSettings, seed: int) -> Iterator[Tensor]:
    """Rows of one batch after another, each epoch in a new order; the rest of an epoch is left out."""
    draws = torch.Generator().manual_seed(seed)
    while True:
        order_T = train_T[torch.randperm(len(train_T), generator=draws).to(train_T.device)]
        yield from order_T[: len(order_T) // settings.batch * settings.batch].split(settings.batch)


class _Adam:
    """Adam (Kingma & Ba 2015) on the bank's stacked weights; members can be dropped on the way."""

    def __init__(self, bank: CriticBank) -> None:
        self.bank = bank
        self._optimizer = self._of_weights()

    def _of_weights(self) -> torch.optim.Adam:
        weights = [w.requires_grad_(True) for w in self.bank.weights.values()]
        return torch.optim.Adam(weights, lr=self.bank.settings.lr, fused=True)

    def step(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def keep(self, members: list[int]) -> None:
        """Forget all members but these, in the bank, too."""
        before = [self._optimizer.state[w] for w in self.bank.weights.values()]
        self.bank.keep(members)
        self._optimizer = self._of_weights()
        for w, state in zip(self.bank.weights.values(), before, strict=True):
            moments = {name: state[name][members].clone() for name in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[w] = {"step": state["step"], **moments}


def train(
    bank: CriticBank, pairs: Pairs, train_T: Tensor, test_T: Tensor, seed: int, tell: TellLine = lambda line: None
) -> list[Trained]:
    """Every member of the bank, trained on rows `train_T` and read on rows `test_T`, in the bank's order.

    A member ends when `patience` test estimates in a row brought no new maximum. `tell` is called after each estimate.
    """
    of = bank.settings
    found = [Trained(k, float("-inf"), 0, {}, []) for k, _ in bank.members]
    draws = torch.Generator().manual_seed(seed)
    order = test_T[torch.randperm(len(test_T), generator=draws).to(test_T.device)]
    test = order[: min(of.test_batches, len(order) // of.batch) * of.batch].split(of.batch)
    alive, adam = list(range(len(found))), _Adam(bank)
    for step, rows in enumerate(batches(train_T, of, seed), start=1):
        adam.step(-info_nce(bank.scores(*pairs[rows])).sum())
        if step % of.every == 0:
            _read(bank, [found[m] for m in alive], pairs, test, step)
            left = [i for i, m in enumerate(alive) if step - found[m].step < of.patience * of.every]
            tell(f"critics at step {step} of {of.steps}, {len(left)} of {len(found)} go on")
            if not left or step >= of.steps:
                break
            if len(left) < len(alive):
                adam.keep(left)
                alive = [alive[i] for i in left]
    return found


@torch.no_grad()
def _read(bank: CriticBank, members: list[Trained], pairs: Pairs, test: tuple[Tensor, ...], step: int) -> None:
    """Add the members' test estimates at this step, and keep the weights of those with a new smoothed maximum."""
    of = bank.settings
    now_M = torch.stack([info_nce(bank.scores(*pairs[rows])) for rows in test]).mean(dim=0)
    for i, member in enumerate(members):
        member.curve.append((step, float(now_M[i])))
        last = [value for _, value in member.curve[-of.smooth :]]
        smoothed = sum(last) / len(last)
        if len(last) == of.smooth and smoothed > member.estimate:
            member.estimate, member.step = smoothed, step
            member.weights = {name: w[i : i + 1].detach().clone() for name, w in bank.weights.items()}
