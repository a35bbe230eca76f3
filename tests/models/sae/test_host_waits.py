"""The torch backend as an accelerator runs it: on a CPU, told not to wait, with every request for a number counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode, resolve_name

from models.sae import engines, trainer
from models.sae.engines import PARAMETERS, ROOM, Number, TorchEngine, on_host
from models.sae.trainer import SAEBank, SAEConfig, SparseTrainer
from tests.models.sae.test_topk_training import activations, assert_same_state, config_of

# what makes the host wait for an accelerator: numbers, results whose size depends on numbers, and copies of numbers
ASKING = {
    "item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "argwhere",
    "masked_select", "bincount", "unique", "unique_consecutive", "histc", "tensor", "as_tensor", "from_numpy",
}  # fmt: skip


class Waits(TorchFunctionMode):
    """Lists the calls that would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.transfers = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = (resolve_name(func) or getattr(func, "__name__", "")).rsplit(".", 1)[-1]
        chosen = args[1] if name in ("__getitem__", "__setitem__") else None
        parts = chosen if isinstance(chosen, tuple) else (chosen,)
        boolean = any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)
        ragged = name == "repeat_interleave" and isinstance(args[-1], torch.Tensor) and "output_size" not in kwargs
        if name in ASKING or boolean or ragged:
            self.found.append(name)
        return func(*args, **kwargs)


def screened(config: SAEConfig, *, waits: bool) -> SparseTrainer:
    """With the low-precision screen of an accelerator, whatever this CPU has."""
    ours = SparseTrainer(config, backend="torch")
    assert isinstance(ours._engine, TorchEngine)
    assert ours._engine.waits
    ours._engine.waits, ours._engine.screen_dtype = waits, torch.bfloat16
    return ours


def counted(step: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Waits:
    waits = Waits()

    def transfer(*values: Number) -> list[float]:
        waits.transfers += 1
        with torch._C.DisableTorchFunction():
            return on_host(*values)

    with monkeypatch.context() as patched, waits:
        patched.setattr(trainer, "on_host", transfer)
        step()
    return waits


@pytest.mark.parametrize("dead", [1000, 0], ids=["all live", "dead features"])
def test_a_step_asks_the_device_once(dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = screened(config_of(d_sae=2048, dead_after_steps=dead), waits=False)
    ours.step(activations(256, 32, 0))
    stats, x = [], activations(256, 32, 1)
    waits = counted(lambda: stats.append(ours.step(x)), monkeypatch)
    assert (stats[0].dead > 0) == (dead == 0)
    assert waits.found == []
    assert waits.transfers == 1


def test_the_count_sees_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that may wait does so, and each kind of request is seen."""
    ours = screened(config_of(d_sae=2048), waits=True)
    x = activations(256, 32, 0)
    assert {"nonzero", "__bool__"} <= set(counted(lambda: ours.step(x), monkeypatch).found)

    def requests() -> None:
        x[x > 0]
        x[x > 0] = 1.0
        float(x.sum())
        torch.bincount(torch.arange(3))
        torch.arange(2).repeat_interleave(torch.tensor([1, 2]))

    found = counted(requests, monkeypatch).found
    assert found == ["__getitem__", "__setitem__", "__float__", "bincount", "tensor", "repeat_interleave"]


def test_a_bank_asks_once_for_its_batches_and_once_per_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = SAEBank({k: (0, config_of(k=k)) for k in (4, 8)}, backend="torch")
    for cell in bank.trainers.values():
        cell._engine.waits, cell._engine.screen_dtype = False, torch.bfloat16  # type: ignore[attr-defined]
    x = activations(128, 32, 0)
    waits = counted(lambda: bank.step({0: x}), monkeypatch)
    assert waits.found == []
    assert waits.transfers == 3


def blind(config: SAEConfig, *, waits: bool) -> SparseTrainer:
    """A trainer whose screen cannot rank: a component common to all tokens and features."""
    ours = screened(config, waits=waits)
    ours.sae.W_enc[:, 0] = 0.05
    return ours


@pytest.mark.parametrize("dead", [1000, 0], ids=["all live", "dead features"])
def test_more_doubt_than_room_begins_the_step_anew(dead: int) -> None:
    config = config_of(d_in=64, d_sae=1024, k=16, dead_after_steps=dead)
    waiting, ours = (blind(config, waits=waits) for waits in (True, False))
    assert isinstance(ours._engine, TorchEngine)
    assert ours._engine.room == ROOM
    for step in range(3):
        x = activations(128, 64, step)
        x[:, 0] = 3000.0
        expected, stats = waiting.step(x), ours.step(x)
        assert stats.rescreened == expected.rescreened > 100
        assert stats.loss == pytest.approx(expected.loss, rel=1e-6)
    assert ours._engine.room == 128
    for name in PARAMETERS:
        torch.testing.assert_close(getattr(ours.sae, name), getattr(waiting.sae, name), rtol=1e-4, atol=1e-6)


def test_rows_that_are_sure_keep_what_the_screen_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for more rows than are in doubt changes nothing, even where the full scoring would say otherwise."""
    monkeypatch.setattr(engines, "exact_topk", lambda sae, x, norm, k, live: torch.zeros(len(x), k, dtype=torch.int64))
    config = config_of(d_sae=2048)
    waiting, ours = (screened(config, waits=waits) for waits in (True, False))
    x = activations(256, 32, 3)
    for one in (waiting, ours):
        assert one._engine.gradients(x, None).rescreened == 0
    for name in PARAMETERS:
        assert torch.equal(ours._engine.gradient(name), waiting._engine.gradient(name)), name


def test_a_continued_run_keeps_its_room_and_its_bits() -> None:
    config = config_of(d_in=64, d_sae=1024, k=16)
    batches = [activations(128, 64, step) for step in range(4)]
    for x in batches:
        x[:, 0] = 3000.0
    whole = blind(config, waits=False)
    for x in batches[:2]:
        whole.step(x)
    state = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in whole.state_dict().items()}
    continued = blind(config, waits=False)
    continued.load_state_dict(state)
    assert isinstance(continued._engine, TorchEngine)
    assert continued._engine.room == 128
    for x in batches[2:]:
        whole.step(x)
        continued.step(x)
    assert_same_state(whole, continued)


def test_what_is_not_finite_changes_no_weight() -> None:
    ours = screened(config_of(dead_after_steps=0), waits=False)
    ours.step(activations(64, 32, 0))
    before = {name: getattr(ours.sae, name).clone() for name in PARAMETERS}
    x = activations(64, 32, 1)
    x[3, 4] = torch.nan
    with pytest.raises(ValueError, match="1 of 2048 activations are NaN or inf at step 1; no weight was changed"):
        ours.step(x)
    with pytest.raises(FloatingPointError, match=r"gradient norm is (inf|nan) at step 1; no weight was changed"):
        ours.step(activations(64, 32, 1) * 1e25)
    assert all(torch.equal(getattr(ours.sae, name), before[name]) for name in PARAMETERS)
    assert ours.step(activations(64, 32, 1)).step == 2


def test_numbers_of_both_sides_come_back_in_order() -> None:
    assert on_host(1.5, torch.tensor(2), torch.tensor(True), 3) == [1.5, 2.0, 1.0, 3.0]
    assert on_host() == []
