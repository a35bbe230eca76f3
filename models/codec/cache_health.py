"""How the layers with memory caching use their caches, clip by clip.

Shapes: B clips, T time, D model width, L complete segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from models.mixers.memory_cache import CachedMixer


@dataclass(frozen=True)
class CacheHealth:
    """How one layer uses its caches, over the tokens that see at least one; NaN where none does.

    entropy: of gamma, nats. entropy_share: entropy over the log of the number of choices, 0 to 1.
    cache_mass: sum of gamma on caches, 0 to 1. openness: sigmoid(b), 1 without a bias. gate_bias: b, NaN without.
    effective_mass: openness times cache_mass, the weight caches have in the layer's output.
    read_ratio: root mean square of (mixed - x_out) over that of x_out, what the gate would let in if it were open.
    """

    layer: int
    entropy: float
    entropy_share: float
    cache_mass: float
    gate_bias: float
    openness: float
    effective_mass: float
    read_ratio: float


@dataclass(frozen=True)
class GateSums:
    """Sums [B], one per clip, over its tokens that see a cache; steps counts them. See CacheHealth for the terms.

    change and current: sums of squares of (mixed - x_out) and of x_out.
    """

    layer: int
    gate_bias: float
    openness: float
    steps: Tensor
    entropy: Tensor
    entropy_share: Tensor
    cache_mass: Tensor
    change: Tensor
    current: Tensor

    @staticmethod
    def pool(parts: Sequence[GateSums]) -> GateSums:
        """The same layer's sums over several batches. Raises ValueError for another layer's among them."""
        first = parts[0]
        if any(part.layer != first.layer for part in parts):
            raise ValueError(f"layers {sorted({part.layer for part in parts})} do not pool; give parts of one layer")
        sums = [torch.cat([getattr(part, f.name) for part in parts]) for f in fields(GateSums)[3:]]
        return GateSums(first.layer, first.gate_bias, first.openness, *sums)

    def health(self) -> CacheHealth:
        """Means over the tokens of all clips."""
        return self._health(slice(None))

    def clips(self) -> list[CacheHealth]:
        """Means over the tokens of each clip."""
        return [self._health(slice(b, b + 1)) for b in range(len(self.steps))]

    def _health(self, clips: slice) -> CacheHealth:
        steps = self.steps[clips].sum()
        entropy, share, mass = (
            float(x[clips].sum() / steps) for x in (self.entropy, self.entropy_share, self.cache_mass)
        )
        ratio = float((self.change[clips].sum() / self.current[clips].sum()).sqrt())
        return CacheHealth(self.layer, entropy, share, mass, self.gate_bias, self.openness, self.openness * mass, ratio)


@torch.no_grad()
def gate_sums(layer: int, mixer: CachedMixer, x_BTD: Tensor, length_B: Tensor | None = None) -> GateSums:
    """Statistics of one layer's gates and reads for its normed inputs; tokens from length_B on (padding) are left out.

    A cache is seen only by later segments, so that a token's numbers never depend on tokens after it.
    """
    gate, T = mixer.gate, x_BTD.shape[1]
    gates_BTL, current, mixed = mixer.reads(x_BTD)
    position = torch.arange(T, device=x_BTD.device)
    seen_BT = (position >= gate.segment).expand(len(x_BTD), T)
    if length_B is not None:
        seen_BT = seen_BT & (position < length_B.to(x_BTD.device)[:, None])
    choices_T = (position // gate.segment + 1).clamp_min(2)
    entropy_BT = torch.special.entr(gates_BTL).sum(-1)

    def total(values_BT: Tensor) -> Tensor:
        return values_BT.double().masked_fill(~seen_BT, 0.0).sum(1).cpu()

    return GateSums(
        layer=layer,
        gate_bias=float("nan") if gate.bias is None else float(gate.bias),
        openness=1.0 if gate.bias is None else float(gate.bias.sigmoid()),
        steps=seen_BT.sum(1).cpu(),
        entropy=total(entropy_BT),
        entropy_share=total(entropy_BT / choices_T.log()),
        cache_mass=total(1 - gates_BTL[..., -1]),
        change=total((mixed - current).double().flatten(2).square().sum(-1)),
        current=total(current.double().flatten(2).square().sum(-1)),
    )
