"""What the machinery needs of a sweep: the base class of all of them.

Only identity lives in a cell (what is computed). Where and how it runs (paths, devices, addresses) is
`settings.RunSettings` and never enters a key.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from sweeps.core.cells import CellT, Estimate, Pack, PublishedCell
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext
from sweeps.launch.first_view import View
from sweeps.search.halving import Extent

PresetT = TypeVar("PresetT")
BY_CHANCE = "the best of several seeds is chance; judge each trial by several, as in seeds=0,1,2"


class Sweep(ABC, Generic[CellT, PresetT]):
    """A question, its presets (frozen dataclass values) and what is computed for a cell. `command.main` runs it.

    The object keeps nothing between calls: it travels to the workers, by the name of its class where they can import
    that, else (a class of the script that was started) with its code.

    headline: the name of the number that `progress(best=…)` carries. named: the fields of a cell that name its run in
    MLflow; without them the run is called by the cell's key. tracked: the parameters of rows that MLflow gets as
    `metric/value`; rows with other parameters are in the ledger alone. view: the columns and charts that MLflow opens
    on. options: further options of the command line, each with the field of the preset that it sets. fixed: {field:
    reason} of fields of the preset that no search may vary, because its trials would be measured differently.
    unseen: the whole-numbered field of presets that says which part of the data is held out, and whose next value holds
    out a part that no cell of the preset is scored on; empty where there is none.
    follow_up: {preset: the one that one would run after it}, for presets on stand-ins.
    """

    name: str
    version: str
    question: str
    default_preset: str
    presets: Mapping[str, PresetT]
    headline: str = "value"
    named: Sequence[str] = ()
    tracked: Sequence[str] = ()
    view: View = View()
    options: Mapping[str, str] = {}
    fixed: Mapping[str, str] = {}
    unseen: str = ""
    follow_up: Mapping[str, str] = {}

    @abstractmethod
    def plan(self, preset: PresetT) -> Sequence[CellT]:
        """All cells of a preset; raises UserError for a preset that makes no sense."""

    def extent(self, preset: PresetT) -> Extent | None:
        """What a search may stop a trial of this preset at; None (the default) where there is nothing."""
        return None

    def plan_until(self, preset: PresetT, amount: int) -> Sequence[CellT]:
        """The cells of a preset that is stopped at an amount of its extent; raises UserError as `plan` does.

        What is computed up to there is part of what the whole takes: a trial that goes on continues from it, to the
        same bits as one that was never stopped.
        """
        raise NotImplementedError(f"{self.name} has an extent and does not say what is computed up to an amount of it")

    def checkpoint(self, cell: CellT, preset: PresetT, run: RunSettings) -> str:
        """Name of the checkpoint that `run` keeps of a finished cell when `keep_checkpoints` is set; empty for none."""
        return ""

    @abstractmethod
    def pack(self, cells: Sequence[CellT], preset: PresetT, machine: Machine, run: RunSettings) -> list[Pack[CellT]]:
        """Group cells that share work within the memory and devices of the machine.

        Cells that need the results of others may be left out, never all of them: packing is asked for again with
        what is left once the returned packs have ended.
        """

    @abstractmethod
    def run(self, pack: Pack[CellT], preset: PresetT, context: PackContext) -> None:
        """Compute every cell of the pack and publish each as soon as it is finished."""

    @abstractmethod
    def fingerprint(self, cell: CellT, preset: PresetT, run: RunSettings) -> str:
        """Digest of all that decides the cell's numbers, the content of its data and weights included."""

    @abstractmethod
    def estimate(self, cells: Sequence[CellT], preset: PresetT, machine: Machine, run: RunSettings) -> Estimate:
        """Work left in `cells`."""

    @abstractmethod
    def report(self, cells: Sequence[PublishedCell], preset_name: str, preset: PresetT, out: Path) -> list[str]:
        """Write the report into the folder `out`; return the answer in three to six lines, each below its label.

        They are the last thing that a launch prints: what was found, in words with the numbers, and on what. The
        launch's run in MLflow gets them as its description, and what the report's file `first_view.SUMMARY` has as
        metrics and tags. Touches neither Ray nor a checkpoint.
        """

    @abstractmethod
    def banner(self, preset_name: str, preset: PresetT) -> list[str]:
        """What this run stands on, in plain words: real or stand-in models, data and weights."""

    def threads(self, planned: Sequence[CellT], preset: PresetT, machine: Machine, run: RunSettings) -> int:
        """CPU threads of a pack, 0 (the default) for what `pack` gives it.

        They follow from all planned cells, never from those that are missing, or an interrupted run would go on with
        another number and other last bits.
        """
        return 0

    def remarks(self, preset: PresetT, run: RunSettings) -> list[str]:
        """Lines on the files that the settings name, for the banner; by default none."""
        return []

    def preflight(self, cells: Sequence[CellT], preset: PresetT, run: RunSettings) -> list[str]:
        """Look, before Ray starts, whether the data and weights of missing cells are within reach and fit.

        Returns lines on what else was found; raises UserError. By default nothing is looked at.
        """
        return []

    def pin(self, cells: Sequence[CellT], run: RunSettings) -> RunSettings:
        """The settings with the commits of what is read from the Hugging Face hub; by default nothing is."""
        return run
