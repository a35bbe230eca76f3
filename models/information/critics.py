"""Critics of several bottleneck widths side by side: encoders of both views, and scores of all pairs of a batch.

A member is one critic: encoders f and g (two hidden layers of leaky ReLU, then k_z linear outputs) with a separable
critic f(x)ᵀg(y), or a hybrid one, an MLP of [f(x), g(y)] with one hidden layer (Gulati, Abdelaleem, Sederberg &
Nemenman 2026, arXiv:2602.08105). All members see the same batches. Their weights are stacked; outputs beyond a
member's own k_z have weights of 0, whose gradients are 0, so that members of all widths share every product.

Shape suffixes: M members, N pairs of a batch, D width of a view, K largest k_z, H hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.information.pairs import SLOPE, pair_scores
from models.information.settings import CriticSettings

# uniform weights of this over √fan_in keep an output's variance; with a third of it (torch's own start) the codes
# begin near 0, where a hybrid critic is nearly linear, and a second dimension is found hundreds of steps later
_BOUND = math.sqrt(3.0)
ROOM = 8  # outputs are padded to a multiple of this


class CriticBank:
    """Critics for views of the given widths. A member is a k_z and the number of its start; its weights depend on these
    and the seed alone."""

    def __init__(
        self,
        settings: CriticSettings,
        members: Sequence[tuple[int, int]],
        widths: tuple[int, int],
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings = settings
        self.members = tuple(members)
        drawn = [self._member(k, widths, 1_000_003 * seed + 10_007 * start + k) for k, start in members]
        self.weights = {name: torch.stack([w[name] for w in drawn]).to(device) for name in drawn[0]}

    def _member(self, k: int, widths: tuple[int, int], seed: int) -> dict[str, Tensor]:
        draws = torch.Generator().manual_seed(seed)
        of = self.settings
        room = -(-of.dimensions[-1] // ROOM) * ROOM

        def linear(fan_in: int, *shape: int) -> Tensor:
            return (2 * torch.rand(*shape, generator=draws) - 1) * _BOUND / math.sqrt(fan_in)

        def outputs(*shape: int, fan_in: int) -> Tensor:
            return torch.nn.functional.pad(linear(fan_in, *shape), (0, room - k))

        weights: dict[str, Tensor] = {}
        for view, width in zip("fg", widths, strict=True):
            for layer, fan_in in (("1", width), ("2", of.hidden)):
                weights[f"{view}{layer}"] = linear(fan_in, fan_in, of.hidden)
                weights[f"{view}{layer}b"] = linear(fan_in, 1, of.hidden)
            weights[f"{view}3"] = outputs(of.hidden, k, fan_in=of.hidden)
            weights[f"{view}3b"] = outputs(1, k, fan_in=of.hidden)
        if of.critic == "hybrid":
            for view in "fg":
                weights[f"{view}4"] = outputs(of.joint, k, fan_in=2 * k).T.contiguous()
            weights |= {"b": linear(2 * k, 1, of.joint), "v": linear(of.joint, of.joint)}
        return weights

    def encode(self, x_ND: Tensor, view: str, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """f or g (`view`) of one batch for every member, [M, N, K]."""
        w = self.weights if weights is None else weights
        z_MNH = x_ND.expand(len(w[f"{view}1"]), *x_ND.shape)
        for layer in "12":
            z_MNH = torch.baddbmm(w[f"{view}{layer}b"], z_MNH, w[f"{view}{layer}"])
            z_MNH = torch.nn.functional.leaky_relu(z_MNH, SLOPE)
        return torch.baddbmm(w[f"{view}3b"], z_MNH, w[f"{view}3"])

    def scores(self, x_ND: Tensor, y_ND: Tensor) -> Tensor:
        """The critic's score of x_i with y_j, [M, N, N]."""
        w = self.weights
        f_MNK, g_MNK = self.encode(x_ND, "f"), self.encode(y_ND, "g")
        if self.settings.critic == "separable":
            return torch.bmm(f_MNK, g_MNK.transpose(1, 2))
        return pair_scores(torch.baddbmm(w["b"], f_MNK, w["f4"]), torch.bmm(g_MNK, w["g4"]), w["v"])

    def keep(self, members: Sequence[int]) -> None:
        """Forget all members but these."""
        self.members = tuple(self.members[m] for m in members)
        self.weights = {name: w.detach()[list(members)] for name, w in self.weights.items()}


def info_nce(scores_MNN: Tensor) -> Tensor:
    """InfoNCE of every member in nats, [M]: log N + mean_i (s_ii − log Σ_j exp s_ij) <= log N.

    A lower bound of the mutual information for any scores (van den Oord, Li & Vinyals 2018, arXiv:1807.03748).
    """
    own_MN = scores_MNN.diagonal(dim1=1, dim2=2)
    return math.log(scores_MNN.shape[1]) + (own_MN - scores_MNN.logsumexp(dim=2)).mean(dim=1)
