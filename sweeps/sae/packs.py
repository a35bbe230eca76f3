"""Packs of the proxy gap by memory and devices, and what finishing them takes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sweeps.core.cells import Pack, UserError
from sweeps.core.machine import HEADROOM, Machine
from sweeps.core.settings import RunSettings
from sweeps.sae.cells import SAECell, sae_config
from sweeps.sae.lms import spec_of

if TYPE_CHECKING:
    from models.sae.trainer import SAEConfig
_PROCESS_BYTES = 3 * 2**29  # an interpreter with torch, transformers and Ray loaded
_USABLE = 0.75  # share of free memory that packs may plan with
pass_of: Callable[[SAECell], tuple[Any, ...]] = operator.attrgetter(
    *("model", "stream", "context", "batch_tokens", "shuffle_sequences", "eval_sequences", "lm_dtype"),
    *("drop_positions", "max_norm_multiple", "hook", "blocks", "text", "text_column", "rungs", "legibility"),
    *("information", "eval_part"),
)
"""What cells that one LM pass serves have in common, of those that are trained here and of audits."""


def pack_bytes(cells: Sequence[SAECell], run: RunSettings) -> int:
    """Peak memory of one pack: process, LM, SAEs with their training state, one shuffle block, evaluation."""
    from models.sae.trainer import bank_bytes

    first, spec = cells[0], spec_of(cells[0].model, run)
    width = spec.d_model
    layers = len({c.layer for c in cells})
    trajectories = [own for shared in shared_passes(cells).values() for own in shared.values()]
    # a decay branch has weights and moments of its own in addition to the trunk's
    saes = [sae_config(own[0], width) for own in trajectories for _ in range(1 + _branches_at_once(own))]
    lm = spec.n_parameters * (2 if first.lm_dtype == "bfloat16" else 4)
    block = layers * first.shuffle_sequences * first.context * width * 4
    evaluation = ((2 if first.rungs == "free" else 3) * layers + 2) * first.eval_sequences * first.context * width * 4
    # in addition to each covariance: the first four tokens per sequence and the longest of all (analysis.sae.variance)
    apart = first.eval_sequences * (4 + 0.02 * first.context)
    covariance = spec.n_layers * (width * width * 8 + int(apart) * width * 4)
    if first.information == "on":  # both views of the tokens in float64, and again as critics read them
        evaluation += 6 * first.eval_sequences * first.context * width * 4
    return _PROCESS_BYTES + lm + block + evaluation + covariance + bank_bytes(saes, first.batch_tokens)


def _branches_at_once(cells: Sequence[SAECell]) -> int:
    """Most decay branches of one trajectory that live at the same step."""
    ends = [c.steps for c in cells]
    decay = cells[0].decay_steps
    return max(sum(end - decay < other <= end for other in ends) for end in ends)


def steps_of(cells: Sequence[SAECell], config: SAEConfig) -> int:
    """Training steps of one trajectory: the trunk's to its last branching point, and those of every decay branch."""
    leaves = [config.branch_step(c.steps) for c in cells]
    return max(leaves) + sum(c.steps - leaf for c, leaf in zip(cells, leaves, strict=True))


def shared_passes(cells: Sequence[SAECell]) -> dict[tuple[Any, ...], dict[tuple[Any, ...], list[SAECell]]]:
    """{what an LM pass is shared by: {trajectory: its cells}}, both in plan order by layer."""
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], list[SAECell]]] = {}
    for cell in sorted(cells, key=lambda c: c.layer):
        groups.setdefault(pass_of(cell), {}).setdefault(cell.trajectory(), []).append(cell)
    return groups


def _split(trajectories: list[list[SAECell]], parts: int) -> list[list[SAECell]]:
    """Contiguous parts (neighbouring layers together) of nearly equal numbers of trajectories."""
    bounds = [len(trajectories) * i // parts for i in range(parts + 1)]
    chunks = [trajectories[lo:hi] for lo, hi in pairwise(bounds)]
    return [[cell for trajectory in chunk for cell in trajectory] for chunk in chunks if chunk]


def make_packs(cells: Sequence[SAECell], machine: Machine, run: RunSettings) -> list[Pack[SAECell]]:
    """One pack per (model, stream) where it fits; more where memory, `cells_per_pack` or idle devices ask for it.

    Raises UserError when a single SAE does not fit.
    """
    return list(_packs(tuple(cells), machine, run))


@functools.lru_cache(maxsize=1)  # a plan asks for its packs and then for what they take
def _packs(cells: tuple[SAECell, ...], machine: Machine, run: RunSettings) -> tuple[Pack[SAECell], ...]:
    node = _Node.of(machine, run)
    parts, sizes, sharing = _fitting_parts(cells, machine, node, run)
    if machine.gpus:
        cpus = threads(cells, machine, run)
    else:
        held = max(sharing, int(node.free // max(sizes)))
        cpus = run.threads or _threads(node.cores, node.at_once(len(parts)), held)
    return tuple(
        Pack(
            name=f"{part[0].model.rstrip('/').rsplit('/', 1)[-1]}-{i:02d}",  # of a path or OWNER/NAME the last part
            cells=tuple(part),
            cpus=cpus,
            gpus=1.0 if machine.gpus else 0.0,
            memory_bytes=size,
        )
        for i, (part, size) in enumerate(zip(parts, sizes, strict=True))
    )


@dataclass(frozen=True)
class _Node:
    """What one node of the machine offers to packs."""

    nodes: int  # of the machine
    cores: int
    free: float  # bytes that its packs may plan with: of the node's memory, or of a GPU's
    most: int  # packs that it can run at once

    @classmethod
    def of(cls, machine: Machine, run: RunSettings) -> _Node:
        cores = max(1, machine.cpus // machine.nodes)
        most = 1 if machine.gpus else _placed(cores, run.threads) if run.threads else cores
        return cls(machine.nodes, cores, _device_bytes(machine, run) * _USABLE, most)

    def at_once(self, packs: int) -> int:
        """Packs that this node runs at once when all nodes together have `packs`."""
        return min(self.most, -(-packs // self.nodes))


def _fitting_parts(
    cells: Sequence[SAECell], machine: Machine, node: _Node, run: RunSettings
) -> tuple[list[list[SAECell]], list[int], int]:
    """(the cells of every pack, the bytes of every pack, how many packs share the memory of a node)."""
    groups = [list(g.values()) for g in shared_passes(cells).values()]
    wanted = _shares([len(g) for g in groups], max(len(groups), machine.gpus or machine.nodes))
    sharing = node.at_once(sum(wanted))
    while True:
        parts = _split_all(groups, wanted, node.free / sharing, sharing, run)
        sizes = [pack_bytes(part, run) for part in parts]
        at_once = node.at_once(len(parts))
        # with a set number of threads Ray runs all of `at_once`: memory must hold them, or be shared by more
        if not run.threads or at_once <= sharing or at_once * max(sizes) <= node.free:
            return parts, sizes, sharing
        sharing = at_once


def threads(planned: Sequence[SAECell], machine: Machine, run: RunSettings) -> int:
    """CPU threads of a pack when all these cells are planned: a GPU's share, else as memory lets packs run at once."""
    if run.threads or machine.gpus:  # known without packing, which takes long for a hundred thousand cells
        return run.threads or max(1, machine.cpus // machine.gpus)
    return int(make_packs(planned, machine, run)[0].cpus)


def _placed(cores: int, cpus: int) -> int:
    """Packs of `cpus` threads that Ray runs at once on a node."""
    return max(1, int(cores / (cpus * HEADROOM)))


def _threads(cores: int, abreast: int, held: int) -> int:
    """The fewest threads a pack, at least `cores` over `abreast`, with which Ray runs no more packs than `held`."""
    cpus = max(1, cores // abreast)
    while min(abreast, _placed(cores, cpus)) > held:
        cpus += 1
    return cpus


def _split_all(
    groups: Sequence[list[list[SAECell]]], wanted: Sequence[int], room: float, together: int, run: RunSettings
) -> list[list[SAECell]]:
    """The cells of all packs, `together` of which share a node. Raises UserError when one SAE exceeds `room`."""
    out: list[list[SAECell]] = []
    for trajectories, parts in zip(groups, wanted, strict=True):
        split, largest = _split_within(trajectories, parts, room, run)
        if largest > room:
            alone = "; set threads to all cores of a node, and one pack has it alone" if together > 1 else ""
            raise UserError(
                f"one SAE of {split[0][0].model} with d_sae={split[0][0].d_sae} needs {largest / 2**30:.1f} GiB but "
                f"{room / 2**30:.1f} GiB are free for a pack; choose a smaller expansion or batch_tokens{alone}"
            )
        out += split
    return out


def _split_within(
    trajectories: list[list[SAECell]], parts: int, room: float, run: RunSettings
) -> tuple[list[list[SAECell]], int]:
    """The fewest parts, at least `parts`, whose packs fit `room` and `cells_per_pack`; also the largest pack's bytes.

    The number is bracketed by doubling and halved, so that a hundred thousand cells are not split once a part.
    """

    def attempt(n: int) -> tuple[bool, list[list[SAECell]], int]:
        split = _split(trajectories, n)
        largest = max(pack_bytes(p, run) for p in split)
        too_many = run.cells_per_pack and max(map(len, split)) > run.cells_per_pack
        return largest <= room and not too_many, split, largest

    low, high, last = parts - 1, parts, len(trajectories)
    best = attempt(high)
    while not best[0] and high < last:
        low, high = high, min(2 * high, last)
        best = attempt(high)
    while high - low > 1:
        middle = (low + high) // 2
        tried = attempt(middle)
        if tried[0]:
            high, best = middle, tried
        else:
            low = middle
    return best[1], best[2]


def _shares(sizes: list[int], total: int) -> list[int]:
    """`total` parts over groups in proportion to their sizes, at least one each, at most one per trajectory."""
    shares = [1] * len(sizes)
    while sum(shares) < total:
        open_groups = [i for i, n in enumerate(sizes) if shares[i] < n]
        if not open_groups:
            break
        shares[max(open_groups, key=lambda i: sizes[i] / shares[i])] += 1
    return shares


def _device_bytes(machine: Machine, run: RunSettings) -> int:
    if not machine.gpus:
        return machine.memory_bytes
    if run.gpu_memory_gb:
        return int(run.gpu_memory_gb * 2**30)
    import torch

    if not torch.cuda.is_available():
        raise UserError("the cluster has GPUs but this node has none to ask for its memory; add --set gpu_memory_gb=80")
    return torch.cuda.get_device_properties(0).total_memory
