"""Statements of the utility reports and how their error rates are simulated."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks._calibration import Statement

STATEMENTS: Sequence[Statement] = ()
