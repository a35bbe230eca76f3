"""What `--plan` prints: a summary in units that people read, the details, and the cells."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sweeps.core.cells import Cell, Estimate, described, varying
from sweeps.core.gpus import GPU_TYPES
from sweeps.core.machine import Machine
from sweeps.core.units import quantity, span
from sweeps.launch.cost import gpu_hours

_ENDS = 5  # cells listed at each end of a large grid
_ONE_GPU = "a100-80gb-sxm"  # the GPU that a plan is set against, whatever was asked for


@dataclass(frozen=True, kw_only=True)
class PlanText:
    """What is planned on this machine. estimate: of the cells that are neither done nor being listed as done.

    cells: all planned ones; done, failed: keys among them. packs: that the rest will run in.
    """

    cells: Sequence[Cell]
    done: Collection[str]
    failed: Collection[str]
    packs: int
    estimate: Estimate
    machine: Machine

    def summary(self) -> str:
        """One line: how much work is left, and how long it takes here and on one GPU."""
        missing = len(self.cells) - len(self.done)
        if not missing:
            return f"summary      all {len(self.cells)} cells are done"
        parts = [f"{missing} of {len(self.cells)} cells to do"]
        if self.estimate.flops:
            parts.append(quantity(self.estimate.flops, "FLOP"))
        parts.append(f"about {span(self.estimate.seconds)} on this machine")
        if self.estimate.flops or self.estimate.bytes:
            hours = gpu_hours(self.estimate, GPU_TYPES[_ONE_GPU])
            parts.append(f"about {span(hours * 3600)} on one A100 (assumed, not measured)")
        return f"summary      {', '.join(parts)}"

    def details(self) -> list[str]:
        """Work, memory and time, a line each; those of cost are `cost.cost_lines`."""
        estimate, machine = self.estimate, self.machine
        missing = len(self.cells) - len(self.done)
        lines = [
            f"cells        {len(self.cells)} planned, {len(self.done)} done, {missing} to do"
            + (f", {len(self.failed)} of them failed before" if self.failed else ""),
            f"packs        {self.packs} on {machine.cpus} CPUs, {machine.gpus} GPUs",
        ]
        if estimate.lm_passes:
            lines.append(f"LM passes    {estimate.lm_passes} shared by all cells of a model and stream")
        lines += [f"shared       {line}" for line in estimate.shared]
        if estimate.tokens:
            lines.append(f"tokens       {quantity(estimate.tokens)}")
        if estimate.flops:
            lines.append(f"FLOPs        {quantity(estimate.flops, 'FLOP')}")
        lines.append(f"memory       {estimate.memory_bytes / 2**30:.2f} GiB in the largest pack")
        lines.append(f"time         {span(estimate.seconds)} on this machine ({estimate.basis})")
        return lines

    def table(self, every: bool) -> list[str]:
        """The cells with their keys: all of a small grid, the first and last of a large one unless `every` is given."""
        names, common = varying(self.cells)
        lines = [f"  all cells: {common}", f"{'key':16}  state    cell"]
        left_out = len(self.cells) - 2 * _ENDS
        if every or left_out <= 2 * _ENDS:
            return [*lines, *(self._row(cell, names) for cell in self.cells)]
        first, last = self.cells[:_ENDS], self.cells[-_ENDS:]
        lines += [self._row(cell, names) for cell in first]
        lines.append(f"{'…':16}  {left_out} more cells; --plan --all lists them")
        return [*lines, *(self._row(cell, names) for cell in last)]

    def _row(self, cell: Cell, names: Sequence[str]) -> str:
        state = "done" if cell.key in self.done else "failed" if cell.key in self.failed else "to do"
        return f"{cell.key}  {state:7}  {described(cell, names)}"
