"""Threads by default: they follow from the whole plan, so that an interrupted run continues with as many as before."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest

from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings


@pytest.mark.parametrize("cpus", [2, 16])
@pytest.mark.parametrize("room", ["codec", "caching", "sae"])
def test_the_last_missing_cell_gets_as_many_threads_as_all(room: str, cpus: int) -> None:
    """Before, the last of 16 processors' cells got 16 threads where each had had one."""
    sweep = importlib.import_module(f"sweeps.{room}.sweep").SWEEP
    preset = sweep.presets[sweep.default_preset]
    machine = Machine(nodes=1, cpus=cpus, gpus=0, memory_bytes=64 * 2**30, hardware="simulated")
    cells = sweep.plan(preset)
    run = replace(RunSettings(), threads=sweep.threads(cells, preset, machine, RunSettings()))
    whole = {pack.cpus for pack in sweep.pack(cells, preset, machine, run)}
    last = {pack.cpus for pack in sweep.pack(cells[-1:], preset, machine, run)}
    assert whole == last
    assert len(whole) == 1
