"""One of several processes that train a tiny model together (see test_train_world): RANK SIZE MEETING OUT."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from models.codec.delay import training_pair
from models.codec.model import build_codec_lm
from models.codec.presets import LOCAL
from models.codec.text import TextConfig, encode_texts
from models.mixers.memory_cache import MemoryCacheConfig
from sweeps.codec.loop import AnomalyError, Batch, Owner, Pace, StepStats, TrainConfig, Trainer, train
from sweeps.core.world import World
from sweeps.launch.stop import PackStopped

STEPS = 20
# batches shorter than a segment leave the memory's own parameters without a gradient; texts have different lengths
CONFIG = replace(
    LOCAL,
    d_model=16,
    n_layers=2,
    n_heads=2,
    d_ff=16,
    n_codebooks=2,
    codebook_size=11,
    context=32,
    mixer="linear_attention",
    memory_cache=MemoryCacheConfig(segment=8),
    text=TextConfig(width=8, n_layers=1, n_heads=2, d_ff=8, max_bytes=20, blocks=(2,)),
)


def batch_at(step: int) -> Batch:
    """Three clips of different lengths; every fifth batch is one clip, fewer than there are processes."""
    generator = torch.Generator().manual_seed(step)
    clips, frames = (1 if step % 5 == 4 else 3), (5 if step % 3 == 2 else 20)
    codes = torch.randint(0, CONFIG.codebook_size, (clips, 2, frames), generator=generator)
    codes[0, :, 4:] = CONFIG.pad
    inputs, targets = training_pair(codes, pad=CONFIG.pad, bos=CONFIG.bos)
    texts = encode_texts(["longer than the next", "", "short"][:clips], 20)
    return Batch(inputs, targets, int((targets != CONFIG.pad).sum()), texts)


def trainer(world: World, **changes: Any) -> Trainer:
    config = TrainConfig(steps=STEPS, lr=3e-3, lr_end=1e-3, warmup_steps=3, **changes)
    return Trainer(build_codec_lm(CONFIG, seed=1), config, world=world, maker="test 1")


def run(t: Trainer, steps: int = STEPS, stop_after: int = STEPS) -> list[float]:
    """Losses of the steps up to `steps`; process 1 asks to stop after `stop_after`."""
    losses: list[float] = []

    class Observed(Owner):
        def save(self, trainer: Trainer) -> None:
            trainer.spikes.update(saved=trainer.step_count)

        def report(self, trainer: Trainer, stats: StepStats, rate: float) -> None:
            losses.append(stats.loss)

        def stopping(self) -> bool:
            return t.world.rank == 1 and t.step_count == stop_after

    train(t, batch_at, Observed(), Pace(eval_every=STEPS), until=steps)
    return losses


def main(rank: int, size: int, meeting: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    world = World.join()
    found: dict[str, Any] = {}

    whole = trainer(world)
    found["losses"] = run(whole)
    found["model"] = whole.model.state_dict()
    micro = trainer(world, micro_batch=1)
    run(micro)
    found["micro"] = micro.model.state_dict()

    first = trainer(world)
    try:
        run(first, stop_after=6)
    except PackStopped:
        found["stopped"] = first.step_count
    found["saved"] = first.spikes.pop("saved", None)
    found["state"] = copy.deepcopy(first.state())  # the optimizer keeps the tensors that it is given, and changes them
    second = trainer(world)
    second.restore(first.state())
    run(second)
    found["resumed"] = second.model.state_dict()

    bad = trainer(world)
    if rank == 1:
        with torch.no_grad():
            bad.model.heads.mul_(torch.nan)
    try:
        bad.step(batch_at(0))
    except AnomalyError as error:
        found["anomaly"] = str(error)
    found["gathered"] = world.gather(rank)
    found["shared"] = world.share(rank)
    torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
