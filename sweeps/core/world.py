"""The processes that train one model together: which of them this is, and what they tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`; `group` is the process group for small messages (gloo, on the CPU).

    With one process nothing is sent. All processes must make the same calls in the same order.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @staticmethod
    def join() -> World:
        """The world of the default process group, or of this process alone where there is none."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return World()
        group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        return World(dist.get_rank(), dist.get_world_size(), group)

    @property
    def first(self) -> bool:
        """Whether this is the process that saves, samples and publishes."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64."""
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.group)
        return sums.tolist()

    def gather(self, item: Any) -> list[Any]:
        """The items of all processes, by rank."""
        if self.size == 1:
            return [item]
        import torch.distributed as dist

        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return items

    def share(self, item: Any) -> Any:
        """The item of process 0, for decisions that depend on what only one process may look at."""
        if self.size == 1:
            return item
        import torch.distributed as dist

        box = [item]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]
