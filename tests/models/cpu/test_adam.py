"""Optimizers without torch's compiler: torch's own numbers, and nothing of the compiler is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models.cpu.adam import Adam, AdamW

ROOT = Path(__file__).resolve().parents[3]


def trained(optimizer: type[torch.optim.Optimizer], **options: Any) -> torch.Tensor:
    """Parameters of a small net after ten steps, saved and loaded in the middle."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))
    optim = optimizer(net.parameters(), lr=0.01, weight_decay=0.1, **options)  # type: ignore[call-arg]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, 0.01, total_steps=20)
    for step in range(10):
        loss = net(torch.randn(4, 5)).pow(2).mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
        schedule.step()
        if step == 4:
            state = optim.state_dict()
            optim = optimizer(net.parameters(), lr=0.01, weight_decay=0.1, **options)  # type: ignore[call-arg]
            optim.load_state_dict(state)
            schedule.optimizer = optim
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("ours", "torchs"), [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)])
def test_the_same_bits_as_torchs(
    ours: type[torch.optim.Optimizer], torchs: type[torch.optim.Optimizer], fused: bool
) -> None:
    assert issubclass(ours, torchs)
    assert torch.equal(trained(ours, fused=fused), trained(torchs, fused=fused))


def test_no_graph_is_kept_of_a_step() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optim = Adam([weight])
    weight.grad = torch.ones(3)
    optim.step()
    assert weight.requires_grad
    assert weight.grad_fn is None


def test_training_does_not_import_torchs_compiler() -> None:
    script = (
        "import runpy, sys; test = runpy.run_path(sys.argv[1])\n"
        "for optimizer in (test['Adam'], test['AdamW']):\n"
        "    for fused in (False, True):\n"
        "        test['trained'](optimizer, fused=fused)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, __file__], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout.strip() == "False"
