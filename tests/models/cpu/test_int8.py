"""Our int8 product is exact, whatever the shape and the number of threads."""

from __future__ import annotations

import pytest
import torch

from models.cpu import int8
from models.sae import precision, screen
from models.sae.model import SAEConfig
from models.sae.trainer import SparseTrainer

pytestmark = pytest.mark.skipif(not int8.pairs_int8(), reason="this processor has no AVX2")


def product(x: torch.Tensor, W: torch.Tensor, n_threads: int = 1) -> torch.Tensor:
    panels = torch.full(int8.packed_shape(*W.shape), 99, dtype=torch.int16)
    out = torch.full((len(x), len(W)), -1, dtype=torch.int32)
    return int8.multiply(x, int8.pack(W, panels, n_threads), out, n_threads)


@pytest.mark.parametrize("shape", [(1, 1, 1), (6, 2, 16), (7, 33, 50), (13, 128, 331), (64, 70, 15)])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_the_sums_are_exact(shape: tuple[int, int, int], n_threads: int) -> None:
    rows, width, features = shape
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randint(-128, 128, (n, width), generator=generator, dtype=torch.int8) for n in (rows, features))
    assert torch.equal(product(x, W, n_threads), (x.long() @ W.long().T).int())


def test_the_widest_rows_do_not_overflow() -> None:
    x = torch.full((2, 131_072), 127, dtype=torch.int8)
    W = torch.stack([x[0], -x[0]])
    assert product(x, W).tolist() == [[127 * 127 * 131_072, -127 * 127 * 131_072]] * 2


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_training_has_the_same_bits_with_either_product(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(screen, "screen_precision", lambda: torch.int8)
    config = SAEConfig(d_in=29, d_sae=331, k=7, kind=kind, seed=0, warmup_steps=2, dead_after_steps=1)
    weights = []
    for pairs in (True, False):
        monkeypatch.setattr(screen, "multiplies_pairs", lambda pairs=pairs: pairs)
        trainer = SparseTrainer(config, backend="numba", n_threads=1)
        for step in range(4):
            trainer.step(torch.randn(200, 29, generator=torch.Generator().manual_seed(step)))
        weights.append(trainer.sae.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_faster_product_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {torch._int_mm: 4.0, precision._paired: 1.0}
    monkeypatch.setattr(precision, "_seconds", lambda dtype, limit, multiply: taken[multiply])
    assert precision.product_seconds(torch.int8) == 1.0
    assert precision.multiplies_pairs.__wrapped__()
    taken[torch._int_mm] = 0.5
    assert precision.product_seconds(torch.int8) == 0.5
    assert not precision.multiplies_pairs.__wrapped__()
    monkeypatch.setattr(int8, "pairs_int8", lambda: False)
    taken[torch._int_mm], taken[precision._paired] = 4.0, 1.0
    assert precision.product_seconds(torch.int8) == 4.0
