"""How many null draws does a claim need, and what do those at hand leave open?

Power and the spread of a repeated protocol are not predicted here: from eight runs and some hundred draws no such
prediction kept its stated rate.
"""

from __future__ import annotations

import math

from analysis.thresholds import least_draws
from analysis.topology.null_tests import NullTest, Ratio


def advice(ratio: Ratio, test: NullTest, *, runs: int, alpha: float = 0.05, tests: int = 1) -> str:
    """One sentence: does the ratio's interval leave 1 out, what does it lack, and can the draws carry a verdict.

    `runs` observed runs; `tests` that Holm's adjustment counts. "Decided" is said where the 95% interval excludes 1.
    """
    seen = f"with {runs} runs and {ratio.draws} null draws worth {ratio.effective:.0f} independent ones"
    if runs < 2:
        said = f"ratio without an interval {seen}: it needs ≥ 2 runs"
    elif ratio.lo > 1 or ratio.hi < 1:
        said = f"ratio decided: 95% interval {_limits(ratio)} excludes 1 {seen}"
    else:
        lacks = "" if ratio.effective >= least_draws() else f"; an upper limit of the threshold needs ≥ {least_draws()}"
        said = f"ratio undecided: 95% interval {_limits(ratio)} holds 1 {seen}{lacks}"
    least = test.draws_needed(alpha, tests)
    family = f"{tests} {'test' if tests == 1 else 'tests'}"
    return f"{said}; p < {alpha:g} over {family} needs ≥ {least} null draws, there are {test.draws}"


def _limits(ratio: Ratio) -> str:
    low = f"{ratio.lo:.2f}" if ratio.lo > 0 else "–"
    return f"{low} to {ratio.hi:.2f}" if math.isfinite(ratio.hi) else f"{low} to –"
