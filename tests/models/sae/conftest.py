"""The screen's precision in tests of the SAE engines."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Screens in int8 whatever this CPU multiplies fast."""
    monkeypatch.setattr("models.sae.screen.screen_precision", lambda: torch.int8)
