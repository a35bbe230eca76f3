"""What all sweeps over audio-token models plan in the same way: packs of equal work, and their cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from sweeps.codec.cells import LMCell, TokenStudy, columns
from sweeps.core.cells import Pack
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.sweep import BY_CHANCE
from sweeps.search.halving import Extent

LMCellT = TypeVar("LMCellT", bound=LMCell)
TRACKED = ("weights", "group", "layer", "codebook")  # parameters of rows that MLflow shows, see `Sweep`
_DATA = ("corpus", "corpus_clips", "audio_path", "codec", "codec_weights", "codebooks", "codebook_size", "text")
_SIZES = ("chunk_s", "min_s", "holdout", "eval_clips", "eval_part")
# fields that no search may vary, see `Sweep`
FIXED = {"seeds": BY_CHANCE} | dict.fromkeys(
    (*_DATA, *_SIZES), "its trials would be scored on other tokens, or other recordings"
)
UNSEEN = "eval_part"  # see `Sweep`
CPU_FLOPS = 16e9  # a core's rate on small models, forward and backward
_GPU_FLOPS = 30e12  # assumed of an A100 in bfloat16; never measured
GPU_BASIS = "an assumed 30 TFLOP/s a GPU; never measured"


def extent(study: TokenStudy) -> Extent:
    """What a search may stop a training at."""
    return Extent("steps", study.steps)


def stopped(cells: Iterable[LMCellT], study: TokenStudy, step: int) -> list[LMCellT]:
    """The cells stopped at this step of the study's `steps`, those with other steps at the same share of them."""
    return [cast("LMCellT", cell.stopped(step / study.steps)) for cell in cells]


def packs(
    units: Iterable[Sequence[LMCell]],
    study: TokenStudy,
    machine: Machine,
    run: RunSettings,
    name: Callable[[int, Sequence[LMCell]], str] = lambda number, cells: f"pack{number}",
) -> list[Pack]:
    """Packs of Ray Train, each with its own GPUs or a share of the cores; the cells of a unit stay together.

    Small models: as many packs as run at once, of equal work, as a pack takes seconds to start. Models sized for GPUs:
    one pack per unit, so that a free GPU takes the next one. `name` names a pack by its number and cells.
    """
    slow_first = sorted(units, key=lambda unit: -len(unit) * unit[0].weight)
    on_gpu = bool(study.needs_gpu and machine.gpus)
    at_once = min(len(slow_first), _slots(study, machine, run))
    cpus = run.workers * run.threads or max(1, machine.cpus // at_once)
    groups: list[list[LMCell]] = [[] for _ in range(len(slow_first) if study.needs_gpu else at_once)]
    for unit in slow_first:
        min(groups, key=lambda group: sum(c.weight for c in group)).extend(unit)
    return [
        Pack(
            name=name(number, group),
            cells=tuple(group),
            cpus=cpus,
            gpus=float(run.workers) if on_gpu else 0.0,
            workers=run.workers,
        )
        for number, group in enumerate(groups, start=1)
    ]


def _slots(study: TokenStudy, machine: Machine, run: RunSettings) -> int:
    """Packs that may run at once, one GPU or core per worker at least."""
    return max(1, (machine.gpus if study.needs_gpu and machine.gpus else machine.cpus) // run.workers)


def threads(units: int, study: TokenStudy, machine: Machine, run: RunSettings) -> int:
    """CPU threads of each worker when this many units are planned: the cores, shared by the packs that run at once.

    0, for Ray to place them as it can, where there are more workers than cores.
    """
    at_once = min(max(1, units), _slots(study, machine, run))
    return machine.cpus // at_once // run.workers


@dataclass(frozen=True)
class Work:
    """What training some cells takes if every clip has full length; `memory_bytes` of the largest of them."""

    tokens: int
    flops: float
    steps: float
    memory_bytes: int

    def gpu_seconds(self, machine: Machine) -> float:
        """Time on the machine's GPUs, at the rate that `GPU_BASIS` states."""
        return self.flops / (_GPU_FLOPS * max(1, machine.gpus))


def work(cells: Sequence[LMCell], study: TokenStudy) -> Work:
    """Tokens, arithmetic, steps and memory of training `cells`."""
    from models.codec.cost import lm_cost

    flops, steps, tokens, memory = 0.0, 0.0, 0, 0
    for cell in cells:
        config = cell.lm_config()
        length = columns(config, cell.chunk_s, cell.codec)
        cost = lm_cost(config, length)
        seen = int(cell.mean_steps * cell.batch_size * length)
        tokens += seen * config.n_codebooks
        flops += 3 * seen * cost.flops_per_token
        steps += cell.mean_steps
        activations = 40 * (study.micro_batch or cell.batch_size) * length * config.d_model * config.n_layers * 4
        # bytes per parameter: weights, gradient, two moments and average while it trains; then without activations, the
        # best and the first weights in addition. A checkpoint adds none: it is written from these and read in use.
        memory = max(memory, 20 * cost.parameters + activations, 28 * cost.parameters)
    return Work(tokens, flops, steps, memory)
