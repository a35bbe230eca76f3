"""What finishing a plan costs, and what its published cells cost so far."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from sweeps.core.cells import CellT, Estimate, UserError
from sweeps.core.gpus import GPU_TYPES, GPUType, asked_types
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.core.units import span
from sweeps.launch.sweep import PresetT, Sweep
from sweeps.ledger.ledger import Ledger
from sweeps.search.options import Asked
from sweeps.search.search import Search

FLOPS_SHARE = 0.3  # of the peak that a well-fed training loop of matrix products reaches; an assumption
BYTES_SHARE = 0.6  # of the memory bandwidth that a streaming kernel reaches; an assumption


def gpu_hours(estimate: Estimate, kind: GPUType) -> float:
    """GPU-hours of the work on one GPU of the type: the longer of its arithmetic and its memory traffic (roofline)."""
    arithmetic = estimate.flops / (kind.bf16_tflops * 1e12 * FLOPS_SHARE)
    traffic = estimate.bytes / (kind.memory_tb_s * 1e12 * BYTES_SHARE)
    return max(arithmetic, traffic) / 3600


def unit_of(machine: Machine) -> tuple[str, int]:
    """What is rented by the hour, and how many of it: GPUs where there are any, else machines."""
    return ("GPU", machine.gpus) if machine.gpus else ("machine", machine.nodes)


def spent_hours(work: Iterable[tuple[str, float, float, str]]) -> tuple[dict[str, tuple[float, int]], int]:
    """({unit: (hours, pack attempts)}, cells of unknown time) of published cells; the units are those of `unit_of`.

    Each cell is (pack attempt, seconds from the attempt's start to its publication, GPUs held where the device is
    "cuda", else part of the machine, device). An attempt lasted until its last cell; it is paid once, however many
    cells it published. Attempts that published nothing leave no record and are not in the sum.
    """
    attempts: dict[str, dict[str, float]] = {}
    unknown = 0
    for attempt, seconds, share, device in work:
        if seconds != seconds or share != share or not device:
            unknown += 1
            continue
        same = attempts.setdefault("GPU" if device == "cuda" else "machine", {})
        same[attempt] = max(same.get(attempt, 0.0), seconds * share)
    return {unit: (sum(same.values()) / 3600, len(same)) for unit, same in sorted(attempts.items())}, unknown


@dataclass(frozen=True)
class Budget:
    """What may be spent: hours of a rented unit, core-hours of machines of so many cores, or money."""

    text: str
    limit: float  # in hours of `unit`, whose cores or price were divided out
    unit: str

    @classmethod
    def read(cls, text: str, machine: Machine, run: RunSettings) -> Budget:
        """Of `20usd`, `6core-hours`, `2gpu-hours` or `2machine-hours`; raises UserError."""
        match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([a-z-]+)", text.strip().lower())
        try:
            amount, name = float(match[1]) if match else 0.0, match[2] if match else ""
        except ValueError:
            amount = 0.0
        if not amount > 0:
            raise UserError(f"--spend {text!r} is no budget; write 20usd, 6core-hours, 2gpu-hours or 2machine-hours")
        if name.endswith("-hours"):
            kinds = {"core-hours": ("machine", machine.cpus), "gpu-hours": ("GPU", 1), "machine-hours": ("machine", 1)}
            if name not in kinds:
                raise UserError(f"--spend {text!r} counts no known hours; write core-hours, gpu-hours or machine-hours")
            return cls(text, amount / kinds[name][1], kinds[name][0])
        if not run.price_per_hour:
            raise UserError(f"--spend {text} is money without a price; add --set price_per_hour=PRICE")
        return cls(text, amount / run.price_per_hour, unit_of(machine)[0])

    def left(self, work: Iterable[tuple[str, float, float, str]]) -> bool:
        """Whether the work (see `spent_hours`) cost less than the budget."""
        return spent_hours(work)[0].get(self.unit, (0.0, 0))[0] < self.limit


def cost_lines(
    estimate: Estimate, machine: Machine, run: RunSettings, work: Iterable[tuple[str, float, float, str]]
) -> list[str]:
    """Lines of `--plan`: what is left on this machine and on the GPU types asked for, and what was spent."""
    unit, number = unit_of(machine)
    price = run.price_per_hour

    def money(hours: float, rate: float) -> str:
        return f" = {hours * rate:.2f} at {rate:g} a {unit} hour" if rate else ""

    left = estimate.seconds / 3600 * number
    priced = money(left, price) or "; --set price_per_hour=PRICE for the money"
    lines = [f"cost         {left:.2f} {unit} hours to finish{priced}"]
    spent, unknown = spent_hours(work)
    for rented, (hours, attempts) in spent.items():
        text = f"spent        {hours:.2f} {rented} hours in {attempts} packs that published"
        if price and rented != unit:  # done on other machines than this one
            text += f"; not in the money: the price is of a {unit} hour"
        elif price:
            text += f"{money(hours, price)}; with what is left {(hours + left) * price:.2f}"
        lines.append(text)
    if unknown:
        lines.append(f"spent        not known of {unknown} cells: they have no record of their time")
    unit = "GPU"
    for name, rate in asked_types(run.gpu).items():
        if not estimate.flops and not estimate.bytes:
            lines.append(f"on {name:14} not known: this sweep does not count its arithmetic")
            continue
        kind = GPU_TYPES[name]
        hours = gpu_hours(estimate, kind)
        rates = f"{FLOPS_SHARE:.0%} of {kind.bf16_tflops:g} TFLOP/s and {BYTES_SHARE:.0%} of {kind.memory_tb_s:g} TB/s"
        lines.append(
            f"on {name:14} {hours:.2f} GPU hours ({span(hours * 3600)} on one){money(hours, rate or price)}; "
            f"assumed {rates} ({kind.source}), not measured"
        )
    return lines


def open_search(
    asked: Asked, sweep: Sweep[CellT, PresetT], preset: PresetT, run: RunSettings, ledger: Ledger
) -> Search[CellT]:
    """The search of a command line; raises UserError."""
    if not asked.spend:
        return Search(asked, sweep, preset, ledger)
    budget = Budget.read(asked.spend, Machine.here(), run)
    return Search(asked, sweep, preset, ledger, lambda keys: budget.left(ledger.work(ledger.done(keys))))


def most_it_costs(
    search: Search[CellT], sweep: Sweep[CellT, PresetT], preset: PresetT, run: RunSettings, machine: Machine
) -> str:
    """Line of `--plan`: what the search costs at most, as many of its dearest trials as are left, one after another."""
    if search.asked.spend:
        return f"search       until {search.asked.spend} are spent, and the trials that are running then"
    quick = replace(run, probe=False)
    left, wholes, cells = search.most_costly(lambda some: sweep.estimate(some, preset, machine, quick).seconds)
    each = sweep.estimate(cells, preset, machine, run).seconds if cells else 0.0
    unit, number = unit_of(machine)
    hours = wholes * each / 3600 * number
    money = f" = {hours * run.price_per_hour:.2f}" if run.price_per_hour else ""
    early = f", stopped early: {wholes:.1f} whole ones" if search.rules.stop else ""
    return (
        f"search       {left} trials to come{early}, at most {hours:.2f} {unit} hours{money}: each as long as the "
        f"longest at the ends of the ranges ({span(each)}), with nothing shared"
    )
