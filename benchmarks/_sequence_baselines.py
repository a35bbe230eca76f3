"""Published formulations of the sequence operators, the arms that benchmarks/sequence_ops.py compares with.

Each is the formulation as published, in plain autograd. Shapes as in models.ops: B batch, T time, H heads, K key
width, V value width, D channels, N states, P head width, L segments, C chunk length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_delta_scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Gated delta rule token by token (Yang et al. 2024, eq. 10)."""
    B, T, H, K = k.shape
    S_BHKV = v.new_zeros(B, H, K, v.shape[3])
    outputs = []
    for t in range(T):
        S_BHKV = S_BHKV * g[:, t].exp()[..., None, None]
        error_BHV = v[:, t] - torch.einsum("bhkv,bhk->bhv", S_BHKV, k[:, t])
        S_BHKV = S_BHKV + k[:, t].unsqueeze(3) * (beta[:, t].unsqueeze(2) * error_BHV).unsqueeze(2)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S_BHKV, q[:, t]) * K**-0.5)
    return torch.stack(outputs, 1)


def chunked_linear_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Normalised linear attention in chunks, and the state after each chunk [B, L, H, K, V]."""
    T = k.shape[1]
    qc, kc, vc = (x.transpose(1, 2).unflatten(2, (T // chunk, chunk)) for x in (q, k, v))
    S_BHLKV = (kc.transpose(3, 4) @ vc).cumsum(2)
    z_BHLK = kc.sum(3).cumsum(2)
    scores = (qc @ kc.transpose(3, 4)).tril()
    numerator = scores @ vc + qc @ F.pad(S_BHLKV, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    denominator = scores.sum(4) + (qc @ F.pad(z_BHLK, (0, 0, 1, 0))[:, :, :-1].unsqueeze(4)).squeeze(4)
    o = (numerator / (denominator.unsqueeze(4) + 1e-6)).flatten(2, 3).transpose(1, 2)
    return o, S_BHLKV.transpose(1, 2)


def segment_gate_logits(u: Tensor, x: Tensor, segment: int) -> Tensor:
    """<u_t, mean of segment i> of the segments before t's, and of t's own up to t, by cumulative sums."""
    x_BLSD = x.unflatten(1, (-1, segment))
    sums_BLSD = x_BLSD.cumsum(2)
    means_BLD = sums_BLSD[:, :, -1] / segment
    counts = torch.arange(1, segment + 1)[:, None]
    current = (u * (sums_BLSD / counts).flatten(1, 2)).sum(-1, keepdim=True)
    own_T = torch.arange(x.shape[1]) // segment
    unseen_TL = torch.arange(x_BLSD.shape[1]) >= own_T[:, None]
    return torch.cat([(u @ means_BLD.mT).masked_fill(unseen_TL, -torch.inf), current], -1)


def memory_cache_reads(q: Tensor, states: Tensor, gates: Tensor) -> Tensor:
    """Every token reads every cache, then the gates weigh the [B, T, L, H, V] answers (arXiv 2602.24281)."""
    reads_BTLHV = torch.einsum("bthk,blhkv->btlhv", q, states)
    return (gates[..., None, None] * reads_BTLHV).sum(2)


def selective_scan_loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Mamba-1 as in its reference and in Hugging Face's slow path.

    All decays and inputs are laid out as [B, D, T, N] first, then taken one token at a time.
    """
    x_BDT, dt_BDT = x.transpose(1, 2), dt.transpose(1, 2)
    decay = torch.exp(dt_BDT.unsqueeze(3) * A[:, None])
    written = (dt_BDT * x_BDT).unsqueeze(3) * B.unsqueeze(1)
    h_BDN = torch.zeros_like(decay[:, :, 0])
    outputs = []
    for t in range(x.shape[1]):
        h_BDN = decay[:, :, t] * h_BDN + written[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", h_BDN, C[:, t]))
    return torch.stack(outputs, 1)


def ssd_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Mamba-2 token by token (Dao, Gu 2024, eq. 1 with scalar decay), B and C of every head."""
    u_BTHP = x * dt.unsqueeze(3)
    decay_BTH = torch.exp(dt * A)
    S_BHPN = x.new_zeros(*u_BTHP[:, 0].shape, B.shape[3])
    outputs = []
    for t in range(x.shape[1]):
        written = u_BTHP[:, t].unsqueeze(3) * B[:, t].unsqueeze(2)
        S_BHPN = decay_BTH[:, t, :, None, None] * S_BHPN + written
        outputs.append(torch.einsum("bhpn,bhn->bhp", S_BHPN, C[:, t]))
    return torch.stack(outputs, 1)


def ssd_listing(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    """Mamba-2 by the four einsums of its paper's listing 1 (Dao, Gu 2024), B and C of every head."""
    n = x.shape[1] // chunk
    u, Bc, Cc = (z.unflatten(1, (n, chunk)) for z in (x * dt.unsqueeze(3), B, C))
    log_decay = (dt * A).unflatten(1, (n, chunk)).permute(0, 3, 1, 2)
    gamma = log_decay.cumsum(3)
    within = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", Cc, Bc, _segment_decay(log_decay), u)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", Bc, (gamma[..., -1:] - gamma).exp(), u)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
    between = _segment_decay(F.pad(gamma[..., -1], (1, 0)))
    entering = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    across = torch.einsum("bclhn,bchpn,bhcl->bclhp", Cc, entering, gamma.exp())
    return (within + across).flatten(1, 2)


def _segment_decay(log_decay: Tensor) -> Tensor:
    """exp of the sums over j < t <= i, by masked cumulative sums of a repeated matrix (the listing's stable form)."""
    size = log_decay.shape[-1]
    repeated = log_decay.unsqueeze(-1).expand(*log_decay.shape, size)
    ones = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    sums = repeated.masked_fill(~ones.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~ones.tril(), -torch.inf).exp()
