"""What the machinery needs of a sweep.

Only identity lives in a cell (what is computed). Where and how it runs (paths, devices, addresses) is
`settings.RunSettings` and never enters a key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sweeps.core.cells import Cell, Estimate, Pack, PublishedCell

if TYPE_CHECKING:
    from sweeps.core.machine import Machine
    from sweeps.core.settings import RunSettings
    from sweeps.launch.context import PackContext


class Sweep(Protocol):
    """What `command.main` needs of a sweep. `report` touches neither Ray nor a checkpoint.

    Seven more are used where a sweep has them: `headline`, the name of the number that `progress(best=…)` carries,
    `named`, the fields of a cell that name its run in MLflow (without them it is called by its key),
    `tracked`, the parameters of rows that MLflow gets as `metric/value` (rows with others are in the ledger alone),
    `threads(planned, preset, machine, run)`, the CPU threads of a pack, as they follow from all planned cells (never
    from those that are missing, or an interrupted run would go on with another number and other last bits),
    `remarks(preset, run)`, lines on the files that the settings name, for the banner,
    `preflight(cells, preset, run)`, which raises UserError before Ray starts when data or weights are out of reach or
    do not fit, and returns lines on what else it found (or None), and
    `pin(cells, run)`, which returns the settings with the commits of what is read from the Hugging Face hub.
    """

    name: str
    version: str
    question: str
    default_preset: str
    presets: Mapping[str, Any]

    def plan(self, preset: Any) -> Sequence[Cell]:
        """All cells of a preset (a frozen dataclass value); raises UserError for a preset that makes no sense."""
        ...

    def pack(self, cells: Sequence[Cell], preset: Any, machine: Machine, run: RunSettings) -> list[Pack]:
        """Group cells that share work within the memory and devices of the machine.

        Cells that need the results of others may be left out, never all of them: packing is asked for again with
        what is left once the returned packs have ended.
        """
        ...

    def run(self, pack: Pack, preset: Any, context: PackContext) -> None:
        """Compute every cell of the pack and publish each as soon as it is finished."""
        ...

    def fingerprint(self, cell: Cell, preset: Any, run: RunSettings) -> str:
        """Digest of all that decides the cell's numbers, the content of its data and weights included."""
        ...

    def estimate(self, cells: Sequence[Cell], preset: Any, machine: Machine, run: RunSettings) -> Estimate:
        """Work left in `cells`."""
        ...

    def report(self, cells: Sequence[PublishedCell], preset_name: str, preset: Any, out: Path) -> list[str]:
        """Write the report into the folder `out`; return lines to print (headline numbers, caveats)."""
        ...

    def banner(self, preset_name: str, preset: Any) -> list[str]:
        """What this run stands on, in plain words: real or stand-in models, data and weights."""
        ...
