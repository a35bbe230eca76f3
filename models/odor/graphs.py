"""Molecules as graphs: featurised once, cut into batches by indexing, summed over neighbours by a fused kernel.

Shapes: N molecules, A atoms, S neighbour slots per atom, F atom features, T bond types, B bond features,
H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from rdkit import Chem, rdBase
from torch import Tensor

ELEMENTS = ("C", "N", "O", "S", "F", "Cl", "Br", "I", "P", "Si", "B")
HYBRIDS = (Chem.HybridizationType.SP, Chem.HybridizationType.SP2, Chem.HybridizationType.SP3)
BONDS = (Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE, Chem.BondType.AROMATIC)


@dataclass(frozen=True, kw_only=True)
class GraphBatch:
    """Some molecules, one after the other.

    `atoms` [A, F]; `slots` [A, S] the neighbours of each atom, then -1; `types` [A, S] the row of `bond_features`
    [T, B] of each; `sizes` [N] atoms a molecule.
    """

    atoms: Tensor
    slots: Tensor
    types: Tensor
    bond_features: Tensor
    sizes: Tensor


class Graphs:
    """All molecules of a table, featurised once.

    Raises:
        ValueError: a SMILES that RDKit cannot read.
    """

    def __init__(self, smiles: Sequence[str]) -> None:
        mols = [_read(string, row) for row, string in enumerate(smiles)]
        sizes = np.array([mol.GetNumAtoms() for mol in mols], np.int64)
        self.start = np.concatenate([[0], np.cumsum(sizes)])
        width = max((atom.GetDegree() for mol in mols for atom in mol.GetAtoms()), default=1)
        self.atoms = np.array([_atom(a) for mol in mols for a in mol.GetAtoms()], np.float32)
        self.slots = np.full((len(self.atoms), max(width, 1)), -1, np.int64)
        self.types = np.zeros_like(self.slots)
        kinds: dict[tuple[float, ...], int] = {}
        filled = np.zeros(len(self.atoms), np.int64)
        for mol, first in zip(mols, self.start, strict=False):
            for bond in mol.GetBonds():
                kind = kinds.setdefault(_bond(bond), len(kinds))
                i, j = bond.GetBeginAtomIdx() + first, bond.GetEndAtomIdx() + first
                for a, b in ((i, j), (j, i)):
                    self.slots[a, filled[a]] = b
                    self.types[a, filled[a]] = kind
                    filled[a] += 1
        self.bond_features = np.array(list(kinds) or [(0.0,) * (len(BONDS) + 3)], np.float32)

    def __len__(self) -> int:
        return len(self.start) - 1

    def batch(self, rows: np.ndarray) -> GraphBatch:
        """The molecules `rows`, in that order."""
        first, sizes = self.start[rows], self.start[rows + 1] - self.start[rows]
        to = np.concatenate([[0], np.cumsum(sizes)])
        shift_A = np.repeat(first - to[:-1], sizes)
        take_A = np.arange(to[-1]) + shift_A
        slots = self.slots[take_A]
        slots = np.where(slots < 0, -1, slots - shift_A[:, None])
        return GraphBatch(
            atoms=torch.from_numpy(self.atoms[take_A]),
            slots=torch.from_numpy(slots),
            types=torch.from_numpy(self.types[take_A]),
            bond_features=torch.from_numpy(self.bond_features),
            sizes=torch.from_numpy(sizes),
        )


@numba.njit(cache=True)
def _forward(h_AH, bond_TH, slots_AS, types_AS):  # type: ignore[no-untyped-def]
    atoms, hidden = h_AH.shape
    out_AH = np.zeros_like(h_AH)
    for i in range(atoms):
        for s in range(slots_AS.shape[1]):
            j = slots_AS[i, s]
            if j < 0:
                break
            t = types_AS[i, s]
            for c in range(hidden):
                out_AH[i, c] += max(h_AH[j, c] + bond_TH[t, c], h_AH.dtype.type(0))
    return out_AH


@numba.njit(cache=True)
def _backward(grad_AH, h_AH, bond_TH, slots_AS, types_AS):  # type: ignore[no-untyped-def]
    atoms, hidden = h_AH.shape
    grad_h_AH = np.zeros_like(h_AH)
    grad_bond_TH = np.zeros_like(bond_TH)
    for i in range(atoms):
        for s in range(slots_AS.shape[1]):
            j = slots_AS[i, s]
            if j < 0:
                break
            t = types_AS[i, s]
            for c in range(hidden):
                flow = grad_AH[i, c] if h_AH[j, c] + bond_TH[t, c] > 0 else h_AH.dtype.type(0)
                grad_h_AH[j, c] += flow
                grad_bond_TH[t, c] += flow
    return grad_h_AH, grad_bond_TH


class _NeighbourSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_AH: Tensor, bond_TH: Tensor, slots_AS: Tensor, types_AS: Tensor) -> Tensor:
        ctx.save_for_backward(h_AH, bond_TH, slots_AS, types_AS)
        return torch.from_numpy(_forward(*(x.detach().numpy() for x in (h_AH, bond_TH, slots_AS, types_AS))))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        arrays = (grads[0].contiguous(), *ctx.saved_tensors)
        grad_h_AH, grad_bond_TH = _backward(*(x.detach().numpy() for x in arrays))
        return torch.from_numpy(grad_h_AH), torch.from_numpy(grad_bond_TH), None, None


def neighbour_sum(h_AH: Tensor, bond_TH: Tensor, graph: GraphBatch) -> Tensor:
    """Σ over the neighbours j of each atom of relu(h_j + bond_type(i, j)): [A, H], on the CPU.

    One pass without a tensor of messages, in a fixed order, so equal inputs give equal bits whatever the thread count.
    """
    return _NeighbourSum.apply(h_AH.contiguous(), bond_TH.contiguous(), graph.slots, graph.types)


def _read(smiles: str, row: int) -> Chem.Mol:
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles) if smiles else None
    if mol is None:
        raise ValueError(f"RDKit cannot read the SMILES {smiles!r} at row {row}; leave such rows out of the table")
    return mol


def _one_of(value: object, known: Sequence[object]) -> list[float]:
    """One-hot over `known`, with a last place for anything else."""
    hot = [float(value == k) for k in known]
    return [*hot, float(not any(hot))]


def _atom(atom: Chem.Atom) -> list[float]:
    return [
        *_one_of(atom.GetSymbol(), ELEMENTS),
        *_one_of(atom.GetTotalDegree(), range(5)),
        *_one_of(atom.GetTotalNumHs(), range(4)),
        *_one_of(atom.GetHybridization(), HYBRIDS),
        float(atom.GetFormalCharge()),
        float(atom.GetIsAromatic()),
        float(atom.IsInRing()),
        *(float(atom.IsInRingSize(size)) for size in (3, 4, 5, 6)),
    ]


def _bond(bond: Chem.Bond) -> tuple[float, ...]:
    kind = _one_of(bond.GetBondType(), BONDS)
    return (*kind, float(bond.GetIsConjugated()), float(bond.IsInRing()))
