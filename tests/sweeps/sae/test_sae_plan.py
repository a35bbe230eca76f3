"""Packs of the proxy gap on machines that do not exist: memory that holds what runs side by side, branches planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from models.sae.trainer import bank_bytes, step_flops
from sweeps.core.cells import Pack, UserError
from sweeps.core.machine import HEADROOM, Machine
from sweeps.core.settings import RunSettings
from sweeps.sae.cells import Grid, SAECell, sae_config
from sweeps.sae.estimate import estimate
from sweeps.sae.packs import _USABLE, make_packs, pack_bytes
from sweeps.sae.sweep import SWEEP

CPUS = 8
GRID = Grid(
    models=("standin-large",),
    depths=("mid",),
    k=(4, 8, 16, 32, 64, 128),
    tokens=(819_200,),
    stream="embedded",
    expansion=1024,
    batch_tokens=2048,
    shuffle_sequences=128,
    warmup_steps=10,
)


def plan(grid: Grid) -> list[SAECell]:
    return list(SWEEP.plan(grid))


def machine(free: float) -> Machine:
    """One node of which packs may plan with `free` bytes."""
    return Machine(nodes=1, cpus=CPUS, gpus=0, memory_bytes=int(free / _USABLE) + 1, hardware="of the tests")


def together(packs: Sequence[Pack]) -> int:
    """Bytes of the packs that Ray runs at once."""
    return min(len(packs), int(CPUS / (packs[0].cpus * HEADROOM))) * max(p.memory_bytes for p in packs)


@pytest.mark.parametrize(("threads", "room"), [(0, 3.3), (1, 9.0), (4, 3.3)])
@pytest.mark.parametrize("cells_per_pack", [0, 1])
def test_packs_that_run_at_once_fit_the_memory(threads: int, room: float, cells_per_pack: int) -> None:
    cells = plan(GRID)
    free = room * pack_bytes(cells[:1], RunSettings())
    crowded = [*cells, *plan(replace(GRID, models=("standin-small",)))]
    for some in (cells, crowded, [*crowded, *plan(replace(GRID, seeds=(1, 2, 3)))]):
        packs = make_packs(some, machine(free), RunSettings(threads=threads, cells_per_pack=cells_per_pack))
        assert together(packs) <= free
        assert sum(len(p.cells) for p in packs) == len(some)
        assert all(p.cpus == (threads or packs[0].cpus) for p in packs)


def test_an_sae_too_large_for_a_share_is_planned_alone_with_all_threads() -> None:
    cells = [c for m in ("standin-large", "standin-small") for c in plan(replace(GRID, models=(m,), k=(4,)))]
    free = 1.5 * pack_bytes(cells[:1], RunSettings())
    with pytest.raises(UserError, match=r"GiB are free for a pack; .*set threads to all cores of a node"):
        make_packs(cells, machine(free), RunSettings())
    packs = make_packs(cells, machine(free), RunSettings(threads=CPUS))
    assert len(packs) == 2
    assert together(packs) <= free
    with pytest.raises(UserError, match=r"choose a smaller expansion or batch_tokens$"):
        make_packs(cells, machine(free / 2), RunSettings(threads=CPUS))


def test_decay_branches_take_memory_and_steps() -> None:
    """Branches of 250 and 300 steps with a decay of 100 live together, that of 400 begins when the last has ended."""
    grid = replace(GRID, k=(4,), tokens=tuple(2048 * steps for steps in (250, 300, 400)), decay_steps=100)
    constant, wsd = plan(replace(grid, decay_steps=0)), plan(replace(grid, schedule="wsd"))
    config = sae_config(wsd[0], 128)
    run = RunSettings(probe=False)
    extra = pack_bytes(wsd, run) - pack_bytes(constant, run)
    assert extra == bank_bytes([config] * 3, 2048) - bank_bytes([config], 2048)
    flops = [estimate(cells, machine(2**36), run).flops for cells in (constant, wsd)]
    assert flops[1] - flops[0] == pytest.approx(step_flops(config, 2048) * 200, rel=1e-6)
