"""Adam and AdamW of torch without its compiler, whose import takes nearly as long as torch's own (1.6 core-seconds).

torch wraps these methods for programs that compile them, and imports the compiler at the first call. Nothing here
compiles an optimizer, so the methods are taken as they are below those wrappers: the same functions, the same numbers.
"""

from __future__ import annotations

import inspect

import torch
from torch.optim.optimizer import Optimizer


class _Plain(Optimizer):
    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class Adam(_Plain, torch.optim.Adam):
    """`torch.optim.Adam`, not for `differentiable=True`."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class AdamW(_Plain, torch.optim.AdamW):
    """`torch.optim.AdamW`, not for `differentiable=True`."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
