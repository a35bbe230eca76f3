"""Views as critics read them: every dimension around its median in robust units, and no token far from all others."""

from __future__ import annotations

import torch
from torch import Tensor

_MAD = 1.4826  # standard deviations of a Gaussian per median absolute deviation
REACH = 3.0  # RMS of a token's dimensions at which lengths are bent, in robust units


def scaled(x_TD: Tensor) -> Tensor:
    """The view after an invertible map, which changes no mutual information, float32.

    Each dimension is centred at its median and divided by 1.4826 median absolute deviations (by its standard deviation
    where that is 0; left alone where it is constant). Then a token of RMS u gets the RMS u / √(1 + u² / REACH²):
    massive activations, hundreds of units from all others, would drown the rest in the first layer of an encoder.
    """
    x_TD = x_TD.detach().float()
    centred_TD = x_TD - x_TD.median(dim=0).values
    unit_D = _MAD * centred_TD.abs().median(dim=0).values
    unit_D = torch.where(unit_D > 0, unit_D, centred_TD.std(dim=0, correction=0))
    z_TD = centred_TD / torch.where(unit_D > 0, unit_D, 1.0)
    square_T1 = z_TD.double().square().mean(dim=1, keepdim=True)
    return (z_TD / (1 + square_T1 / REACH**2).sqrt()).float()
