"""The choice of a backend: measured on a step with dead features, for every shape that can be configured."""

from __future__ import annotations

import pytest
import torch

from models.sae import probe
from models.sae.engines import Losses, TorchEngine
from models.sae.model import SAEConfig
from models.sae.numba_engine import NumbaEngine


@pytest.mark.parametrize(("coefficient", "dead"), [(1.0, 22), (0.0, 0)])
def test_the_auxiliary_loss_is_part_of_what_is_measured(
    coefficient: float, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    for engine in (NumbaEngine, TorchEngine):
        plain = engine.gradients

        def counted(self: NumbaEngine | TorchEngine, x: torch.Tensor, dead: torch.Tensor | None, plain=plain) -> Losses:
            seen.append(0 if dead is None else len(dead))
            return plain(self, x, dead)

        monkeypatch.setattr(engine, "gradients", counted)
    config = SAEConfig(d_in=12, d_sae=64, k=3, seed=0, aux_coefficient=coefficient)
    assert probe.faster_backend(config, 1) in ("numba", "torch")
    assert seen == [dead] * 2 * (1 + probe.PROBE_STEPS)


def test_more_auxiliary_features_than_the_probe_has() -> None:
    config = SAEConfig(d_in=8, d_sae=2 * probe.PROBE_FEATURES, k=2, seed=0, aux_k=probe.PROBE_FEATURES + 1)
    assert probe.faster_backend(config, 1) in ("numba", "torch")
