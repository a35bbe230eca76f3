"""What a training step of an audio-token model asks of a GPU, counted on a CPU."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import torch

from benchmarks._gpu_models import random_batch, trainer_of
from benchmarks._gpu_parts import Plan
from models.codec.model import build_codec_lm
from models.codec.presets import LOCAL
from sweeps.codec.loop import TrainConfig
from tests.models.sae.test_host_waits import Waits


def test_a_step_asks_for_its_loss_and_then_for_all_norms_at_once() -> None:
    plan = Plan(torch.device("cpu"), tiny=True, until=time.monotonic() + 600)
    config = replace(LOCAL, context=16)
    settings = TrainConfig(steps=100, lr=3e-4, lr_end=0.0, warmup_steps=5)
    trainer = trainer_of(build_codec_lm(config), settings)
    batch = random_batch(config, 2, plan)
    waits = Waits()
    with waits:
        stats = trainer.step(batch)
    # __int__ and numpy: checks of tokens and kernels that exist on CPUs alone; __bool__: AdamW's own
    assert Counter(name for name in waits.found if name not in ("__int__", "numpy", "__bool__")) == {
        "__float__": 1,
        "tolist": 1,
    }
    assert sum(norm**2 for norm in stats.group_norms.values()) ** 0.5 - stats.grad_norm < 1e-5 * stats.grad_norm
