"""Packs of the proxy gap by memory and devices, and what finishing them takes."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sweeps.core.cells import Estimate, Pack, UserError
from sweeps.core.machine import HEADROOM, Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.screen import duration

if TYPE_CHECKING:
    from models.host_lm import HostLMSpec
    from models.topk_sae import SAEConfig
    from sweeps.proxy_gap import SAECell

_PROCESS_BYTES = 3 * 2**29  # an interpreter with torch, transformers and Ray loaded
_USABLE = 0.75  # share of free memory that packs may plan with
_LM_EFFICIENCY = 0.6  # of the matmul rate that a whole transformer block reaches
_STEP_TOUCHES = 14  # a dense step reads and writes both matrices, their moments, and reads their gradients
_NOMINAL_FLOPS = 5e10  # a CPU core, when nothing is measured


def _spec(cell: SAECell, run: RunSettings) -> HostLMSpec:
    from models.host_lm import host_lm_spec

    try:
        return host_lm_spec(cell.model, run.lm_path or None)
    except ValueError as error:
        raise UserError(str(error)) from error


def pack_bytes(cells: Sequence[SAECell], run: RunSettings) -> int:
    """Peak memory of one pack: process, LM, SAEs with their training state, one shuffle block, evaluation."""
    from models.topk_sae import bank_bytes
    from sweeps._sae_grid import sae_config

    first, spec = cells[0], _spec(cells[0], run)
    width = spec.d_model
    layers = len({c.layer for c in cells})
    trajectories = [own for shared in _groups(cells).values() for own in shared.values()]
    # a decay branch has weights and moments of its own beside the trunk's
    saes = [sae_config(own[0], width) for own in trajectories for _ in range(1 + _branches_at_once(own))]
    lm = spec.n_parameters * (2 if first.lm_dtype == "bfloat16" else 4)
    block = layers * first.shuffle_sequences * first.context * width * 4
    evaluation = 2 * layers * first.eval_sequences * first.context * width * 4
    # beside each layer's covariance: the first four tokens of a sequence and the longest of all (analysis.variance)
    apart = first.eval_sequences * (4 + 0.02 * first.context)
    covariance = spec.n_layers * (width * width * 8 + int(apart) * width * 4)
    return _PROCESS_BYTES + lm + block + evaluation + covariance + bank_bytes(saes, first.batch_tokens)


def _branches_at_once(cells: Sequence[SAECell]) -> int:
    """Most decay branches of one trajectory that live at the same step."""
    ends = [c.steps for c in cells]
    decay = cells[0].decay_steps
    return max(sum(end - decay < other <= end for other in ends) for end in ends)


def _steps(cells: Sequence[SAECell], config: SAEConfig) -> int:
    """Training steps of one trajectory: the trunk's to its last branching point, and those of every decay branch."""
    leaves = [config.branch_step(c.steps) for c in cells]
    return max(leaves) + sum(c.steps - leaf for c, leaf in zip(cells, leaves, strict=True))


def _groups(cells: Sequence[SAECell]) -> dict[tuple[Any, ...], dict[tuple[Any, ...], list[SAECell]]]:
    """{what an LM pass is shared by: {trajectory: its cells}}, both in plan order by layer."""
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], list[SAECell]]] = {}
    for cell in sorted(cells, key=lambda c: c.layer):
        shared = (
            *(cell.model, cell.stream, cell.context, cell.batch_tokens, cell.shuffle_sequences),
            *(cell.eval_sequences, cell.lm_dtype, cell.drop_positions, cell.max_norm_multiple),
        )
        groups.setdefault(shared, {}).setdefault(cell.trajectory(), []).append(cell)
    return groups


def _split(trajectories: list[list[SAECell]], parts: int) -> list[list[SAECell]]:
    """Contiguous parts (neighbouring layers together) of nearly equal numbers of trajectories."""
    bounds = [len(trajectories) * i // parts for i in range(parts + 1)]
    chunks = [trajectories[lo:hi] for lo, hi in pairwise(bounds)]
    return [[cell for trajectory in chunk for cell in trajectory] for chunk in chunks if chunk]


def make_packs(cells: Sequence[SAECell], machine: Machine, run: RunSettings) -> list[Pack]:
    """One pack a (model, stream) where it fits; more where memory, `cells_per_pack` or idle devices ask for it.

    Raises UserError when a single SAE does not fit.
    """
    groups = [list(g.values()) for g in _groups(cells).values()]
    wanted = _shares([len(g) for g in groups], max(len(groups), machine.gpus or machine.nodes))
    cores = max(1, machine.cpus // machine.nodes)
    free = _device_bytes(machine, run) * _USABLE
    most = 1 if machine.gpus else _placed(cores, run.threads) if run.threads else cores

    def on_a_node(packs: int) -> int:
        return min(most, -(-packs // machine.nodes))

    together = on_a_node(sum(wanted))
    while True:
        parts = _split_all(groups, wanted, free / together, together, run)
        sizes = [pack_bytes(part, run) for part in parts]
        abreast = on_a_node(len(parts))
        # with a set number of threads Ray runs all of `abreast` at once: memory must hold them, or be shared by more
        if not run.threads or abreast <= together or abreast * max(sizes) <= free:
            break
        together = abreast
    if machine.gpus:
        cpus = threads(cells, machine, run)
    else:
        cpus = run.threads or _threads(cores, abreast, held=max(together, int(free // max(sizes))))
    return [
        Pack(
            name=f"{part[0].model}-{i:02d}",
            cells=tuple(part),
            cpus=cpus,
            gpus=1.0 if machine.gpus else 0.0,
            memory_bytes=size,
        )
        for i, (part, size) in enumerate(zip(parts, sizes, strict=True))
    ]


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
    """`total` parts over groups in proportion to their sizes, at least one each, at most one a trajectory."""
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


def estimate(cells: Sequence[SAECell], machine: Machine, run: RunSettings) -> Estimate:
    """Passes, tokens, FLOPs, memory and time to finish `cells` on this machine."""
    from models.host_lm import lm_flops_per_token
    from models.topk_sae import step_flops
    from sweeps._sae_grid import sae_config
    from sweeps.proxy_gap import SAECell

    if not cells:
        return Estimate(seconds=0.0, basis="nothing to do")
    packs = make_packs(cells, machine, run)
    tokens, flops, traffic, busy = 0, 0.0, 0.0, 0.0
    measured: dict[tuple[Any, ...], tuple[float, float]] = {}
    for pack in packs:
        part = [c for c in pack.cells if isinstance(c, SAECell)]
        first = part[0]
        spec = _spec(first, run)
        deepest = max(c.layer for c in part)
        longest = max(c.tokens for c in part)
        forward = partial(lm_flops_per_token, first.model, context=first.context, lm_path=run.lm_path or None)
        evaluated = first.eval_sequences * first.context
        lm = longest * forward(deepest) + 4 * evaluated * forward(None)
        for cell in part:
            lm += evaluated * (forward(None) - forward(cell.layer))
        train = step_bytes = 0.0
        for own in (own for shared in _groups(part).values() for own in shared.values()):
            config = sae_config(own[0], spec.d_model)
            train += step_flops(config, first.batch_tokens) * _steps(own, config)
            step_bytes += _STEP_TOUCHES * 4 * spec.d_model * config.d_sae * _steps(own, config)
        tokens += longest
        flops += lm + train
        weights = spec.n_parameters * (2 if first.lm_dtype == "bfloat16" else 4)
        traffic += weights * (longest / (first.shuffle_sequences * first.context) + 4)
        traffic += step_bytes
        kind = (first.model, first.d_sae, first.batch_tokens, pack.cpus)
        if kind not in measured:
            measured[kind] = _probe(first, spec.d_model, int(pack.cpus), run)
        lm_rate, sae_rate = measured[kind]
        busy += lm / lm_rate + train / sae_rate
    abreast = min(
        len(packs), machine.gpus or machine.nodes * max(1, machine.cpus // machine.nodes // int(packs[0].cpus))
    )
    first_use = _pretraining({c.model for c in cells}, run) if run.probe else {}
    seconds = busy / abreast + sum(first_use.values()) / min(abreast, max(1, len(first_use)))
    probed = "calibrated by a short probe; arithmetic alone, small models took twice as long with starts and waits"
    basis = probed if run.probe else f"assuming {_NOMINAL_FLOPS:.0e} FLOP/s a core, not measured"
    return Estimate(
        lm_passes=len(packs),
        tokens=tokens,
        flops=flops,
        bytes=traffic,
        memory_bytes=max(p.memory_bytes for p in packs),
        shared=tuple(f"{name} is pretrained first, about {duration(s)} h:m:s" for name, s in first_use.items()),
        seconds=seconds,
        basis=basis,
    )


def _probe(cell: SAECell, d_in: int, threads: int, run: RunSettings) -> tuple[float, float]:
    """Measured FLOP/s of the LM's matmuls and of the SAE step at the cell's true shape: a few seconds."""
    if not run.probe:
        return _NOMINAL_FLOPS * threads, _NOMINAL_FLOPS * threads
    import torch

    from models._threads import torch_threads
    from models.topk_sae import SparseTrainer, step_flops
    from sweeps._sae_grid import sae_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch_threads(threads):
        dtype = getattr(torch, cell.lm_dtype)
        x = torch.randn(cell.batch_tokens, d_in, device=device, dtype=dtype)
        w = torch.randn(d_in, 4 * d_in, device=device, dtype=dtype)
        lm_rate = 2 * x.numel() * w.shape[1] / _seconds(lambda: x @ w, threads) * _LM_EFFICIENCY
        config = sae_config(cell, d_in)
        trainer = SparseTrainer(config, n_threads=threads, device=device)
        batch = x.float()
        sae_rate = step_flops(config, cell.batch_tokens) / _seconds(lambda: trainer.step(batch), threads, repeats=2)
    return lm_rate, sae_rate


def _pretraining(models: Collection[str], run: RunSettings) -> dict[str, float]:
    """CPU-seconds to make the stand-ins among `models` that are not in the cache."""
    from data import embedded_text
    from models.registry import HOST_LMS
    from models.standin_lm import pretraining_seconds

    names = [m for m in sorted(models) if not run.lm_path and HOST_LMS[m].origin == "standin"]
    seconds = {name: pretraining_seconds(name, embedded_text.fingerprint()) for name in names}
    return {name: s for name, s in seconds.items() if s}


def _seconds(work: Any, threads: int, repeats: int = 5) -> float:
    """Least seconds of `work`: on a CPU those that `threads` cores computed, so other load does not count."""
    import torch

    gpu = torch.cuda.is_available()

    def once() -> float:
        began = time.perf_counter() if gpu else time.process_time()
        work()
        if gpu:
            torch.cuda.synchronize()
            return time.perf_counter() - began
        return (time.process_time() - began) / threads

    once()
    return min(once() for _ in range(repeats))
