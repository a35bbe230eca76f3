"""How much of a goal's variation over the tried settings each searched field explains."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pandas as pd

from analysis.search.trials import Axis, Goal, StudyTable

LEAST_TRIALS = 10  # done ones; a forest of fewer says little


def importances(study: StudyTable, axes: Sequence[Axis], goal: Goal) -> pd.Series:
    """Shares of the goal's variance by field, the largest first: functional ANOVA of a random forest (Hutter, Hoos &
    Leyton-Brown 2014, ICML, as implemented in Optuna), over the whole space and in the coordinates of the ranges.

    Raises ValueError, with one line, for too few trials or values that do not differ.
    """
    import optuna

    done = study.trials[study.trials["state"] == "done"]
    if len(done) < LEAST_TRIALS:
        raise ValueError(f"{len(done)} measured trials are too few; {LEAST_TRIALS} are needed")
    if done[goal.column].nunique() < 2:
        raise ValueError(f"{goal.column} is the same in all trials")
    varied = [axis for axis in axes if done[axis.field].nunique() > 1]
    if not varied:
        raise ValueError("all measured trials have the same setting")
    unit: optuna.distributions.BaseDistribution = optuna.distributions.FloatDistribution(0.0, 1.0)
    distributions = {a.field: unit for a in varied}
    units = {a.field: a.unit(done[a.field]) for a in varied}
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shown = optuna.create_study()
            for i, value in enumerate(goal.loss(done[goal.column])):
                params = {field: min(max(float(own[i]), 0.0), 1.0) for field, own in units.items()}
                shown.add_trial(optuna.create_trial(params=params, distributions=distributions, value=float(value)))
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            found = optuna.importance.get_param_importances(shown, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(level)
    shares = {a.field: found.get(a.field, 0.0) for a in axes}
    return pd.Series(shares, dtype=float).sort_values(ascending=False, kind="stable")
