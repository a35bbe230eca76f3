"""Whether this process may compute for the launch that started it; data tasks ask, whoever prepared the worker says."""

from __future__ import annotations

_reasons: list[str] = []


def refuse(reason: str) -> None:
    """Let every data task of this process end with `reason`."""
    _reasons.append(reason)


def check() -> None:
    """Raise RuntimeError with the reason where this process was told to refuse."""
    if _reasons:
        raise RuntimeError(_reasons[0])
