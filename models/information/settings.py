"""How critics are trained, and how many held-out pairs that takes; no torch, so that plans can ask."""

from __future__ import annotations

import math
from dataclasses import dataclass

CRITICS = ("hybrid", "separable")


@dataclass(frozen=True, kw_only=True)
class CriticSettings:
    """Sizes as in Gulati, Abdelaleem, Sederberg & Nemenman 2026 (arXiv:2602.08105), where they give them.

    dimensions: k_z of the encoders, ascending. hidden: width of their two hidden layers; joint: of the hybrid critic's.
    batch: N of InfoNCE, whose ceiling is log N. folds: parts of the sequences, each held out once, with a seed each.
    starts: trainings of each k_z per fold, the best of which counts (with large steps two outputs of one may end up
    saying the same). steps: of training at most; every: steps between two test estimates, of `test_batches` batches at
    most; smooth: how many of these are averaged; patience: how many may pass without a new maximum.
    """

    dimensions: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 32)
    critic: str = "hybrid"
    hidden: int = 128
    joint: int = 64
    batch: int = 128
    lr: float = 5e-4
    folds: int = 4
    starts: int = 1
    steps: int = 2000
    every: int = 100
    smooth: int = 3
    patience: int = 6
    test_batches: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.critic not in CRITICS:
            raise ValueError(f"critic={self.critic!r} is not known; choose {' or '.join(CRITICS)}")
        if not self.dimensions or min(self.dimensions) < 1 or sorted(set(self.dimensions)) != list(self.dimensions):
            raise ValueError(f"dimensions={self.dimensions} must ascend from 1 or more; give each k_z once")
        if self.batch < 2 or self.folds < 2 or self.starts < 1:
            raise ValueError(
                f"batch={self.batch}, folds={self.folds}, starts={self.starts}; choose 2 or more of the first two, "
                "and 1 or more starts"
            )
        if self.patience < self.smooth:
            raise ValueError(f"patience={self.patience} is below smooth={self.smooth}; choose patience >= smooth")

    @property
    def ceiling(self) -> float:
        """log N in nats: no estimate is larger."""
        return math.log(self.batch)

    def require(self, sequences: int, length: int) -> None:
        """Raise ValueError (one line) where so many sequences of that length cannot be split and batched."""
        if sequences < self.folds:
            raise ValueError(
                f"sequences={sequences} cannot be split into {self.folds} parts by sequence; give {self.folds} or more"
            )
        least = sequences // self.folds * length
        if least < self.batch:
            raise ValueError(
                f"{sequences} sequences of {length} tokens leave {least} to a part, fewer than batch={self.batch}; "
                f"give {self.folds * -(-self.batch // length)} sequences or more"
            )

    def step_flops(self, widths: tuple[int, int]) -> float:
        """FLOPs of one step of all critics of one fold; no gradient of the views themselves is computed."""
        encoders = 4 * sum(widths) * self.hidden + 12 * self.hidden * (self.hidden + self.dimensions[-1])
        scores = 12 * self.batch * (self.joint if self.critic == "hybrid" else self.dimensions[-1])
        return len(self.dimensions) * self.starts * self.batch * (encoders + scores)

    def require_width(self, width: int) -> None:
        """Raise ValueError (one line) where an encoder would have more dimensions than what it reads."""
        if self.dimensions[-1] > width:
            raise ValueError(f"k_z={self.dimensions[-1]} exceeds width={width}; choose k_z <= width")
