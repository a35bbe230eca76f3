"""Whether this process may compute for the launch that started it: the worker's set-up may refuse, data tasks check."""

from __future__ import annotations

_reasons: list[str] = []


def refuse(reason: str) -> None:
    """Make every data task of this process end with `reason`."""
    _reasons.append(reason)


def check() -> None:
    """Raise RuntimeError with the reason where this process was told to refuse."""
    if _reasons:
        raise RuntimeError(_reasons[0])
