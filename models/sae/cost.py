"""What training SAEs costs, before anything is allocated: bytes of a bank, operations of a step."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from models.cpu.bfloat16 import multiplies_bfloat16
from models.sae.batch_screen import MOST_CANDIDATES, MOST_PER_ROW
from models.sae.engines import Backend, n_candidates
from models.sae.intrinsics import BLOCK
from models.sae.model import SCORE_BYTES, SAEConfig
from models.sae.screen import CHUNK_BYTES_PER_FEATURE, INT8_MARGIN, multiplies_int8


def bank_bytes(configs: Iterable[SAEConfig], batch: int, *, backend: Backend = "numba", aux: bool = True) -> int:
    """Bytes that a bank of these cells holds while it trains on batches of `batch` tokens.

    Every cell has weights and two moments in float32 (and, for numba, room for its screen's copy of the encoder);
    gradients and scratch exist once, for the largest cell. With `aux` the scratch of the auxiliary loss is counted,
    needed as soon as a feature is dead. The dense backend counts the [batch, d_sae] blocks that autograd keeps. The LM,
    its activations, the interpreter and its libraries are not included.
    """
    configs = list(configs)
    own = sum(_cell_bytes(config, backend) for config in configs)
    shared = max((_scratch_bytes(config, batch, backend, aux) for config in configs), default=0)
    return own + shared


def _cell_bytes(config: SAEConfig, backend: Backend) -> int:
    matrix, vectors = config.d_in * config.d_sae, config.d_sae + config.d_in
    state = 4 * 3 * (2 * matrix + vectors) + 4 * config.d_sae
    return state + (_screen_itemsize() * matrix + 9 * config.d_sae if backend == "numba" else 0)


def _screen_itemsize() -> int:
    """Bytes of a weight in the widest precision that the screen may turn to."""
    return 2 if multiplies_int8() and multiplies_bfloat16(torch.device("cpu")) else 4


def _scratch_bytes(config: SAEConfig, batch: int, backend: Backend, aux: bool) -> int:
    D, M = config.d_in, config.d_sae
    gradients = 4 * (2 * D * M + D + M)
    if backend == "dense":
        return gradients + 4 * batch * (8 * M + 4 * D)
    wanted = [config.k] + ([min(config.n_aux, M)] if aux and config.aux_coefficient > 0 else [])
    if backend == "torch":
        # float32 screens keep no bfloat16 copy; int64 indices, their sort and two value arrays per entry
        screen = 4 * D * M + SCORE_BYTES
        return gradients + screen + batch * (4 * 6 * D + max(12 * n_candidates(k, M) + 56 * k for k in wanted))
    widths = [n_candidates(k, M, INT8_MARGIN) for k in wanted]
    per_token = 12 * max(widths) + sum(8 * K + 5 + 20 * k for K, k in zip(widths, wanted, strict=True))
    blocks = 4 * BLOCK * -(-D // BLOCK)
    levels = len(config.widths) - 1
    per_token += (5 if multiplies_int8() else 8) * D + 8 + blocks * (1 + levels + len(wanted) + (len(wanted) > 1))
    per_token += 0 if multiplies_int8() else 2 * D  # 16-bit copies, where int8 is multiplied by pairs
    product = M * min(4 * batch, CHUNK_BYTES_PER_FEATURE) + (0 if multiplies_int8() else 2 * D * M)
    if config.kind != "topk":  # candidates: feature, token, a and score; marks of a block of rows
        per_token += 16 * (MOST_CANDIDATES * config.k + MOST_PER_ROW)
        product += product // 4
    return gradients + batch * per_token + product + 30 * M


def step_flops(config: SAEConfig, batch: int, *, dead: int = 0) -> int:
    """Floating-point operations of one sparse step on `batch` tokens with `dead` dead features.

    Screening product 2·B·d_in·d_sae; for each kept entry re-score, decode, dh and two gradient rows; Adam about 14 a
    weight. The dense step does 6 products of the size of the screen (three forward and backward pairs).
    """
    D, M = config.d_in, config.d_sae
    flops = 2 * batch * D * M + _entry_flops(batch, D, config.k, M)
    if dead and config.aux_coefficient > 0:
        flops += _entry_flops(batch, D, min(config.n_aux, dead), dead)
    return flops + 14 * (2 * D * M + D + M)


def _entry_flops(batch: int, width: int, k: int, features: int) -> int:
    return 2 * batch * width * (n_candidates(k, features) + 4 * k)
