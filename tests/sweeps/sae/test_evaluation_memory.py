"""While a cell is evaluated with all rungs, logits exist a tile at a time: counted at every operation of torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.host import next_token_loss
from models.host.host_lm import HostLM
from models.host.specs import HOST_LMS
from models.host.standin import build_model
from models.sae.folders import reconstructor
from models.sae.model import TopKSAE
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext, Place
from sweeps.sae.cells import sae_config
from sweeps.sae.evaluate import _CHUNK, Evaluation
from sweeps.sae.sweep import SWEEP
from tests.sweeps.sae.test_sae_grid import CONTEXT, GRID, Numbers, fresh

VOCABULARY, WIDTH = 8192, 64
ROWS, COLUMNS = 32, 1024


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation of torch gives, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> HostLM:
    """A model whose vocabulary is large next to everything else, with small tiles."""
    monkeypatch.setattr(next_token_loss, "_ROWS", ROWS)
    monkeypatch.setattr(next_token_loss, "_COLUMNS", COLUMNS)
    torch.manual_seed(0)
    model = build_model("standin-small")
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    return HostLM("standin-small", model, replace(HOST_LMS["standin-small"], d_vocab=VOCABULARY), None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_logits_of_all_positions_are_built_or_kept(lm: HostLM, dtype: str) -> None:
    """The largest tensor is a copy of the unembedding; the logits of a chunk would be twice as large."""
    cell = next(c for c in SWEEP.plan(replace(GRID, lm_dtype=dtype)) if c.layer)
    sae = TopKSAE.from_config(sae_config(cell, WIDTH))
    context = PackContext(
        fresh(), RunSettings(), threads=1, device="cpu", fingerprint=lambda cell: "f", place=Place("test")
    )
    unembedding, chunk = VOCABULARY * WIDTH, _CHUNK * CONTEXT * VOCABULARY
    assert ROWS * COLUMNS < unembedding < chunk
    reconstructor(sae)  # measures once per process which precision screens fastest, on matrices of its own
    with Largest() as whole, torch.no_grad():
        lm.model(torch.from_numpy(Numbers().eval_sequences(_CHUNK)))
    assert whole.elements == chunk  # what the counter sees of a plain forward pass
    with Largest() as seen:
        evaluation = Evaluation(lm, Numbers(), [cell.layer], cell, context)  # type: ignore[arg-type]
        rows, _, _ = evaluation.run(cell, sae)
    measured = {row.metric: row.value for row in rows}
    assert all(measured[name] == measured[name] for name in ("kl", "fisher", "fisher_sampled", "attention_plan"))
    assert seen.elements <= unembedding
