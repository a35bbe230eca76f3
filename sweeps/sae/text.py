"""Whether a text suits its language model and its hold-out: ids of the vocabulary, no held-out row trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from data.token_stream import HeldOutText, TokenStream
from sweeps.core.cells import UserError

MOST_TRAINED_ON = 0.02
"""Share of held-out sequences that may occur in the training text word for word (two hundred rows of any large corpus
hold a licence or a menu twice); the launch reports how many there are."""


def require_ids(tokens_ST: np.ndarray, model: str, d_vocab: int, source: str, place: Callable[[int], str]) -> None:
    """Raise UserError where ids of a text lie outside the model's vocabulary: another tokenizer made them.

    `place` says in words where a row of `tokens_ST` lies.
    """
    if tokens_ST.size and (largest := int(tokens_ST.max())) >= d_vocab:
        row = int(tokens_ST.max(axis=1).argmax())
        raise UserError(
            f"token {largest} of {source} exceeds the vocabulary of {model}, {d_vocab:,}; choose text that was "
            f"tokenized for this model (the token is in {place(row)})"
        )


class TextCheck:
    """Compares training sequences, as they are read, with the held-out ones [S, T] and the models' vocabularies.

    Only what is read is looked at: all that the largest budget trains on, never the rest of the stream. Sequences count
    as equal when all T tokens are. first: number of the first of these among the stream's held-out sequences.
    """

    def __init__(
        self, stream: TokenStream, held_out_ST: np.ndarray, vocabularies: Mapping[str, int], first: int = 0
    ) -> None:
        self.stream, self.vocabularies, self._first = stream, vocabularies, first
        self._held_out, self._total = HeldOutText(held_out_ST), len(held_out_ST)
        self._met: dict[int, int] = {}
        for model, d_vocab in vocabularies.items():
            require_ids(held_out_ST, model, d_vocab, stream.source, self._held_out_place)

    def _held_out_place(self, number: int) -> str:
        return self.stream.held_out_place(self._first + number)

    def training(self, index: int, tokens_nT: np.ndarray) -> bool:
        """Check training sequences `index`, index+1, …; True when held-out ones were met for the first time.

        Raises UserError where an id is outside a vocabulary, or too much of the held-out text has been met.
        """
        for model, d_vocab in self.vocabularies.items():
            require_ids(
                tokens_nT, model, d_vocab, self.stream.source, lambda row: self.stream.training_place(index + row)
            )
        before = len(self._met)
        for number, row in self._held_out.among(tokens_nT).items():
            self._met.setdefault(number, index + row)
        if len(self._met) > MOST_TRAINED_ON * self._total:
            raise UserError(
                f"{self.line()}; more than {MOST_TRAINED_ON:.0%} of them make the evaluation meaningless: remove the "
                "shard that is a copy, or the repeated rows"
            )
        return len(self._met) > before

    def line(self) -> str:
        """One line that counts the held-out sequences met so far and shows the first; empty when none was."""
        if not self._met:
            return ""
        number, index = next(iter(self._met.items()))
        verb = "stand" if len(self._met) > 1 else "stands"
        return (
            f"{len(self._met)} of {self._total} held-out sequences of {self.stream.source} {verb} word for word in the "
            f"training text ({self._held_out_place(number)} is {self.stream.training_place(index)})"
        )
