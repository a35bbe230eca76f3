"""The screen's precision follows a measurement; the measurement is planted here."""

from __future__ import annotations

import pytest
import torch

from models.sae import engines, precision, screen
from models.sae.engines import Scratch, screen_dtype
from models.sae.model import SAEConfig, TopKSAE
from models.sae.precision import choose, product_seconds
from models.sae.screen import Screen, ScreenedEncoder, encoder

PROCESSORS = {  # seconds of float32, int8, bfloat16; what the screen takes
    "AMX, bfloat16 in half of int8's time": (1.0, 0.59, 0.26, torch.bfloat16),
    "VNNI without bfloat16": (1.0, 0.3, 3.0, torch.int8),
    "VNNI and AVX512-BF16": (1.0, 0.3, 0.5, torch.int8),
    "neither": (1.0, 20.0, 6.0, torch.float32),
    "both hardly faster than float32": (1.0, 0.85, 0.9, torch.float32),
    "a tie of the low precisions": (1.0, 0.4, 0.38, torch.int8),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_fastest_product_is_taken(name: str) -> None:
    float32, int8, bfloat16, expected = PROCESSORS[name]
    planted = {torch.float32: float32, torch.int8: int8, torch.bfloat16: bfloat16}
    assert choose(lambda dtype, limit: planted[dtype]) == expected


def test_flags_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All instructions are there by the flags, and the clock says that bfloat16 is slow."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": True})
    monkeypatch.setattr(engines, "bfloat16_is_faster", lambda: False)
    assert screen_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr(engines, "bfloat16_is_faster", lambda: True)
    assert screen_dtype(torch.device("cpu")) == torch.bfloat16
    assert screen_dtype(torch.device("cuda")) == torch.bfloat16
    sae = TopKSAE.from_config(SAEConfig(d_in=32, d_sae=128, k=4, seed=0))
    monkeypatch.setattr(screen, "screen_precision", lambda: torch.float32)
    assert Screen(sae, Scratch(), 1).dtype == torch.float32
    assert encoder(sae) == sae.encode
    monkeypatch.setattr(screen, "screen_precision", lambda: torch.bfloat16)
    assert Screen(sae, Scratch(), 1).dtype == torch.bfloat16
    assert isinstance(encoder(sae), ScreenedEncoder)


@pytest.mark.parametrize("second", [torch.bfloat16, torch.float32])
def test_doubt_turns_int8_alone_to_what_is_faster_of_the_others(
    monkeypatch: pytest.MonkeyPatch, second: torch.dtype
) -> None:
    sae = TopKSAE.from_config(SAEConfig(d_in=32, d_sae=128, k=4, seed=0))
    monkeypatch.setattr(screen, "bfloat16_is_faster", lambda: second == torch.bfloat16)
    for first, then in ((torch.int8, second), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        monkeypatch.setattr(screen, "screen_precision", lambda first=first: first)
        one = Screen(sae, Scratch(), 1)
        one.judge(1.0)
        assert one.dtype == then
        assert one.low_MD().dtype == then


def test_a_hopeless_precision_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(precision.time, "process_time", lambda: float(next(ticks)))
    assert product_seconds(torch.float32, limit=5.0) == 10.0
    assert next(ticks) == 20
    assert product_seconds(torch.float32) == 10.0
    assert next(ticks) == 30 + 20 * precision.RUNS


def test_every_precision_can_be_measured() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        assert 0 < product_seconds(dtype, limit=0.0) < 60
