"""Early stopping: decisions follow the rule and the finished cells, whoever finished them in which order."""

from __future__ import annotations

import argparse
import itertools
import math
import uuid
from typing import Any

import numpy as np
import pytest

from sweeps.caching.presets import PRESETS as CACHING
from sweeps.caching.sweep import SWEEP as MEMORY_CACHE
from sweeps.codec.presets import PRESETS as CODEC
from sweeps.codec.sweep import SWEEP as CODEC_LM
from sweeps.core.cells import UserError
from sweeps.launch import command
from sweeps.ledger.ledger import Ledger
from sweeps.sae.presets import PRESETS as SAE
from sweeps.sae.sweep import SWEEP as PROXY_GAP
from sweeps.search.halving import Extent, Standing, Stop, bracket_sizes, ladder, whole_brackets
from sweeps.search.options import read_asked
from sweeps.search.search import Search
from sweeps.topology.presets import PRESETS as TOPOLOGY
from sweeps.topology.sweep import SWEEP as ODOR_TOPOLOGY
from tests.sweeps.search.bowl import SWEEP, BowlCell, BowlPreset, publish, work


def search(ledger: Ledger, *arguments: str, preset: BowlPreset | None = None) -> Search[Any]:
    parsed: argparse.Namespace = command.parser(SWEEP).parse_args(["--objective=depth:min", "--confirm=0", *arguments])
    asked = read_asked(parsed)[1]
    assert asked is not None
    return Search(asked, SWEEP, preset or BowlPreset(), ledger)


def fresh() -> Ledger:
    return Ledger(f"memory://{uuid.uuid4().hex}", "bowl", "1")


X, N = "--set=x=lin:-3:3", "--set=n=int:2:18"  # n = 13 has no depth, the work refuses n = 17
HALVING = ("--search=tpe", X, N, "--stop=halving", "--trials=27")
HYPERBAND = ("--search=random", X, "--set=n=int:12:18", "--stop=hyperband", "--eta=2", "--trials=20")
CMA = ("--search=cmaes", X, N, "--stop=halving", "--trials=27")
CASES = pytest.mark.parametrize("arguments", [HALVING, HYPERBAND, CMA], ids=["tpe", "hyperband", "cmaes"])


def found(made: Search[Any]) -> list[tuple[Any, ...]]:
    """Every trial with all that was decided of it."""
    (study,) = made.studies
    return [(t.point, o) for t, o in zip(study.trials(made.asked.trials), made.outcomes(study), strict=True)]


def by_hand(standings: np.ndarray, eta: int) -> list[int]:
    """(trials, rungs) losses, NaN for a failure: the last rung of each trial, one elimination after another."""
    alive, reached = set(range(len(standings))), [0] * len(standings)
    for rung in range(standings.shape[1]):
        for trial in alive:
            reached[trial] = rung
        going = math.ceil(len(alive) / eta)
        while len(alive) > going:
            alive.remove(max(alive, key=lambda t: (math.isnan(standings[t, rung]), standings[t, rung], t)))
        alive = {t for t in alive if not math.isnan(standings[t, rung])}
    return reached


@pytest.mark.parametrize("eta", [2, 3, 4])
def test_decisions_are_those_of_eliminating_one_trial_after_another(eta: int) -> None:
    rng = np.random.default_rng(eta)
    for _ in range(200):
        losses_TR = rng.integers(0, 6, (rng.integers(1, 12), 3)).astype(float)  # with ties
        losses_TR[rng.random(losses_TR.shape) < 0.2] = math.nan

        def look(trial: int, rung: int, losses_TR: np.ndarray = losses_TR) -> Standing:
            value = float(losses_TR[trial, rung])
            return (2, 0.0) if math.isnan(value) else (0, value)

        decided = ladder(range(len(losses_TR)), range(3), eta, look)
        assert [decided[t].rung for t in range(len(losses_TR))] == by_hand(losses_TR, eta)
        for trial, reached in decided.items():
            failed = math.isnan(losses_TR[trial, reached.rung])
            assert reached.state == ("ended" if failed or reached.rung == 2 else "stopped")


def test_nobody_goes_on_before_the_last_rival_is_measured() -> None:
    known: dict[tuple[int, int], Standing] = {(0, 0): (0, 1.0), (1, 0): (0, 2.0)}

    def decided() -> list[tuple[int, str]]:
        out = ladder(range(3), range(2), 3, lambda trial, rung: known.get((trial, rung)))
        return [(out[t].rung, out[t].state) for t in range(3)]

    assert decided() == [(0, "open")] * 3
    known[2, 0] = (2, 0.0)
    assert decided() == [(1, "open"), (0, "stopped"), (0, "ended")]
    known[0, 1] = (0, 9.0)
    assert decided() == [(1, "ended"), (0, "stopped"), (0, "ended")]


@CASES
def test_a_search_stops_whom_the_rule_stops(arguments: tuple[str, ...]) -> None:
    made = search(fresh(), *arguments)
    ran = work(made)
    (study,) = made.studies
    stop = made.rules.stop
    assert stop is not None
    first, trainings = 0, 0.0
    for number in itertools.count():
        size = made.rules.sizes[number % len(made.rules.sizes)]
        bracket = found(made)[first : first + size]
        if not bracket:
            break
        rungs = stop.rungs(number)
        cells = [SWEEP.plan(BowlPreset(x=(p["x"],), n=p["n"]))[0] for p, _ in bracket]
        losses = np.array([[measured(c, stop.amounts[r]) for r in rungs] for c in cells])
        reached = by_hand(losses, stop.eta)
        assert [o.rung for _, o in bracket] == [rungs[r] for r in reached]
        for (_, outcome), loss, r in zip(bracket, losses, reached, strict=True):
            failed = math.isnan(loss[r])
            assert outcome.state == ("failed" if failed else "done" if rungs[r] == 2 else "stopped")
            assert failed or outcome.values == (loss[r],)
        first += size
        trainings += stop.wholes(number, size, rungs[0])
    states = [o.state for _, o in found(made)]
    assert {"failed", "done", "stopped"} == set(states)
    assert ran == len({c.key for c in made.cells()})
    best = study.best(made.outcomes(study))
    assert best is not None
    assert states[best] == "done"
    spent = sum(stop.amounts[o.rung] for _, o in found(made)) / stop.amounts[-1]
    assert spent <= trainings + 1e-9  # what --plan says it takes at most


def measured(cell: BowlCell, amount: int) -> float:
    (at,) = SWEEP.plan_until(BowlPreset(x=(cell.x,), n=cell.n), amount)
    return math.nan if cell.n in (13, 17) else at.measured


@CASES
def test_a_kill_anywhere_and_two_launches_decide_the_same(arguments: tuple[str, ...]) -> None:
    whole = search(fresh(), *arguments)
    work(whole)
    ledger = fresh()
    for most in itertools.cycle((9, 3, 1, 2)):  # at the ends of rungs, and within them
        if not work(search(ledger, *arguments), most):
            break
    assert found(search(ledger, *arguments)) == found(whole)
    shared = fresh()
    pair = [search(shared, *arguments) for _ in range(2)]
    for turn in range(200):
        if not work(pair[turn % 2], 1 + turn % 3):
            break
    assert found(search(shared, *arguments)) == found(whole)
    assert search(shared, *arguments).finished


def test_decisions_depend_on_no_order_of_arrival() -> None:
    whole = search(fresh(), *HALVING)
    work(whole)
    rng, ledger = np.random.default_rng(0), fresh()
    late = search(ledger, *HALVING)
    while missing := [c for c in late.advance(record=True) if not late.known.closed(c.key)]:
        for i in rng.permutation(len(missing))[: rng.integers(1, 4)]:
            publish(ledger, missing[i])
    assert found(late) == found(whole)


def test_more_trials_continue_in_whole_brackets() -> None:
    ledger = fresh()
    few = search(ledger, *HALVING[:-1], "--trials=10")
    assert few.asked.trials == 18
    work(few)
    more = search(ledger, *HALVING)
    work(more)
    alone = search(fresh(), *HALVING)
    work(alone)
    assert found(more) == found(alone)
    assert found(more)[:18] == found(few)


def test_only_trials_that_may_go_on_keep_what_they_have() -> None:
    made = search(fresh(), *HALVING)
    for most in itertools.repeat(2):
        ran = work(made, most)
        ended, going = ({c.key for c in cells} for cells in made.ended_cells())
        assert not ended & going
        assert {c.key for c in made.cells()} == ended | going
        assert all(c.key in going for c in made.cells() if not made.known.closed(c.key))
        if not ran:
            break
    assert not made.ended_cells()[1]


def test_brackets_have_hyperbands_sizes_and_budgets() -> None:
    """Li et al. 2018, table 1: eta 3, 81 units, from 81 configurations at 1 unit to 5 at 81."""
    stop = Stop("hyperband", 3, "steps", Extent("steps", 81).amounts(3, 5))
    assert stop.amounts == (1, 3, 9, 27, 81)
    assert bracket_sizes("hyperband", 3, 5, 0) == (81, 34, 15, 8, 5)
    assert [list(stop.rungs(b)) for b in (0, 3, 4, 5)] == [[0, 1, 2, 3, 4], [3, 4], [4], [0, 1, 2, 3, 4]]
    assert [whole_brackets(n, (9, 5, 3)) for n in (1, 9, 10, 17, 18, 34)] == [9, 9, 14, 17, 26, 34]
    assert Extent("tokens", 327_680, 2048).amounts(3, 3) == (36_864, 108_544, 327_680)


def test_rungs_of_the_studies_are_parts_of_their_whole_trials() -> None:
    sae, codec, caching, topology = SAE["local"], CODEC["local"], CACHING["local"], TOPOLOGY["audit"]
    assert PROXY_GAP.extent(sae) == Extent("tokens", 327_680, 2048)
    short, full = (PROXY_GAP.plan_until(sae, amount) for amount in (36_864, 327_680))
    assert [c.trajectory() for c in short] == [c.trajectory() for c in full]
    assert {c.key for c in full} <= {c.key for c in PROXY_GAP.plan(sae)}
    for cells, plan in (
        (CODEC_LM.plan_until(codec, 17), CODEC_LM.plan(codec)),
        (MEMORY_CACHE.plan_until(caching, 27), MEMORY_CACHE.plan(caching)),
    ):
        assert [c.whole().key for c in cells] == [c.key for c in plan]
        assert not {c.key for c in cells} & {c.key for c in plan}
    assert {c.steps: c.end for c in MEMORY_CACHE.plan_until(caching, 27)} == {80: 27, 150: 51}  # the planted task's
    assert [c.key for c in CODEC_LM.plan_until(codec, 50)] == [c.key for c in CODEC_LM.plan(codec)]
    some, more, all_ = ({c.key for c in ODOR_TOPOLOGY.plan_until(topology, n)} for n in (1, 3, 8))
    assert some < more < all_ == {c.key for c in ODOR_TOPOLOGY.plan(topology)}
    assert ODOR_TOPOLOGY.extent(TOPOLOGY["utility"]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stop=half",), "--stop 'half' is not known; did you mean halving"),
        (("--stop=halving", "--eta=1"), "--eta 1 is below 2"),
        (("--stop=halving", "--rungs=1"), "--rungs 1 is below 2"),
        (("--stop=halving", "--rungs=4", "--eta=9"), "has no 4 such budgets; choose fewer --rungs or a larger steps"),
        (("--stop=halving", "--rungs=9", "--eta=9"), "makes brackets of 43046721 trials"),
        (("--eta=3",), "--eta is an option of early stopping; add --stop halving"),
        (("--stop=hyperband", "--batch=9"), "its brackets have sizes of their own; leave out --batch"),
        (("--stop=halving", "--objective=depth:min,size:max"), "--stop takes one objective"),
        (("--stop=halving", "--set=steps=int:9:27"), "--stop halving sets steps itself; leave out its range"),
        (("--stop=hyperband", N, "--search=cmaes"), "cmaes needs generations of one size"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        search(fresh(), "--search=tpe", X, *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_stopped_is_refused() -> None:
    with pytest.raises(UserError, match="these cells have nothing to stop at; leave out --stop"):
        search(fresh(), *HALVING, preset=BowlPreset(steps=0))
