"""Synthetic point clouds whose first homology is known: what the audit must find, and what it must not.

Shapes: n points in D dimensions (`x_ND`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def circle(n: int, seed: int, noise: float = 0.05) -> np.ndarray:
    """Uniform on the unit circle, plus Gaussian noise: [n, 2]; one loop."""
    rng = _rng(n, seed, noise)
    angle_N = rng.uniform(0, 2 * np.pi, n)
    return _blur(np.stack([np.cos(angle_N), np.sin(angle_N)], axis=1), noise, rng)


def figure_eight(n: int, seed: int, noise: float = 0.05) -> np.ndarray:
    """Two unit circles that touch at the origin, plus Gaussian noise: [n, 2]; two loops."""
    rng = _rng(n, seed, noise)
    angle_N = rng.uniform(0, 2 * np.pi, n)
    side_N = rng.choice([-1.0, 1.0], n)
    return _blur(np.stack([np.cos(angle_N) + side_N, np.sin(angle_N)], axis=1), noise, rng)


def torus(n: int, seed: int, noise: float = 0.05, major: float = 2.0, minor: float = 1.0) -> np.ndarray:
    """Uniform by area on a torus of revolution, plus Gaussian noise: [n, 3]; two loops.

    The tube's angle is drawn by rejection against major + minor·cos(angle), the area element (Diaconis, Holmes
    & Shahshahani 2013, "Sampling from a manifold").
    """
    rng = _rng(n, seed, noise)
    if not 0 < minor < major:
        raise ValueError(f"minor={minor}, major={major}; choose 0 < minor < major")
    kept = np.empty(0)
    while kept.size < n:
        angle = rng.uniform(0, 2 * np.pi, 2 * n)
        accept = rng.uniform(0, major + minor, 2 * n) < major + minor * np.cos(angle)
        kept = np.concatenate([kept, angle[accept]])
    tube_N, turn_N = kept[:n], rng.uniform(0, 2 * np.pi, n)
    radius_N = major + minor * np.cos(tube_N)
    x_ND = np.stack([radius_N * np.cos(turn_N), radius_N * np.sin(turn_N), minor * np.sin(tube_N)], axis=1)
    return _blur(x_ND, noise, rng)


def gaussian_blob(n: int, seed: int, dim: int = 3) -> np.ndarray:
    """Standard normal: [n, dim]; no loop."""
    if dim < 1:
        raise ValueError(f"dim={dim}; choose dim >= 1")
    return _rng(n, seed, 0.0).standard_normal((n, dim))


@dataclass(frozen=True)
class Cloud:
    """A sampler `sample(n, seed)` -> [n, D] and the number of loops (first Betti number) of its shape."""

    sample: Callable[[int, int], np.ndarray]
    loops: int


CLOUDS = {
    "circle": Cloud(circle, 1),
    "figure_eight": Cloud(figure_eight, 2),
    "torus": Cloud(torus, 2),
    "gaussian_blob": Cloud(gaussian_blob, 0),
}


def _rng(n: int, seed: int, noise: float) -> np.random.Generator:
    if n < 1 or noise < 0:
        raise ValueError(f"n={n}, noise={noise}; choose n >= 1 and noise >= 0")
    return np.random.default_rng(seed)


def _blur(x_ND: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    return x_ND + noise * rng.standard_normal(x_ND.shape)
