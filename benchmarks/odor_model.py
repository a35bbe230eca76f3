"""Own odor model: the fused neighbour sum against gather, ReLU and scatter as torch operators.

Two cases, forward and backward each: the neighbour sum alone (128 molecules, width 128), and a whole training step
of the network with either. CPU-seconds, paired.

    python benchmarks/odor_model.py [--repeats 7] [--threads 1] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks._paired import machine, markdown_table, paired, timed, write_report
from data.molecules import embedded
from models.odor import member
from models.odor.graphs import GraphBatch, Graphs, neighbour_sum

WIDTH, MOLECULES, STEPS = 128, 128, 20
PEER, OURS = "torch operators", "fused"
NeighbourSum = Callable[[Tensor, Tensor, GraphBatch], Tensor]


def torch_operators(h_AH: Tensor, bond_TH: Tensor, graph: GraphBatch) -> Tensor:
    """Gather the sources, add the bond, ReLU, add up at the targets: one tensor of messages."""
    target, slot = torch.nonzero(graph.slots >= 0, as_tuple=True)
    source, kind = graph.slots[target, slot], graph.types[target, slot]
    message = torch.relu(h_AH.index_select(0, source) + bond_TH.index_select(0, kind))
    return torch.zeros_like(h_AH).index_add(0, target, message)


def sum_alone(total: NeighbourSum, graph: GraphBatch) -> Callable[[], None]:
    h_AH = torch.randn(len(graph.atoms), WIDTH, requires_grad=True)
    bond_TH = torch.randn(len(graph.bond_features), WIDTH, requires_grad=True)

    def work() -> None:
        for _ in range(STEPS):
            total(h_AH, bond_TH, graph).sum().backward()

    return work


def training_step(total: NeighbourSum, graphs: Graphs, rows: np.ndarray) -> Callable[[], None]:
    torch.manual_seed(0)
    net = member.OdorNet(graphs.atoms.shape[1], graphs.bond_features.shape[1], 138)
    optimiser = torch.optim.AdamW(net.parameters())
    target = torch.randint(2, (len(rows), 138)).float()

    def work() -> None:
        setattr(member, neighbour_sum.__name__, total)
        for _ in range(STEPS):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(net(graphs.batch(rows)), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        setattr(member, neighbour_sum.__name__, neighbour_sum)

    return work


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one round, to see that it runs")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    repeats = 1 if options.quick else options.repeats
    graphs = Graphs(embedded().smiles)
    rows = np.random.default_rng(0).permutation(len(graphs))[:MOLECULES]
    arms: dict[str, NeighbourSum] = {PEER: torch_operators, OURS: neighbour_sum}
    results = {
        "neighbour sum, forward and backward": paired(
            {name: timed(sum_alone(total, graphs.batch(rows))) for name, total in arms.items()},
            baseline=PEER,
            repeats=repeats,
        ),
        "training step": paired(
            {name: timed(training_step(total, graphs, rows)) for name, total in arms.items()},
            baseline=PEER,
            repeats=repeats,
        ),
    }
    table = markdown_table(results, baseline=PEER)
    head = f"{MOLECULES} molecules, width {WIDTH}, {STEPS} steps a round."
    write_report(f"# Own odor model\n\n{machine()}\n\n{head}\n\n{table}", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
