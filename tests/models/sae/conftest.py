"""The screen's precision in tests of the SAE engines."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Screens in int8, and in doubt in bfloat16, whatever this CPU multiplies fast."""
    monkeypatch.setattr("models.sae.screen.screen_precision", lambda: torch.int8)
    monkeypatch.setattr("models.sae.screen.bfloat16_is_faster", lambda: True)
