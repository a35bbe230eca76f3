"""The log of claims: who holds what, what a launch gets, and that no two live launches get the same key."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from hypothesis import example, given, settings
from hypothesis import strategies as st

from sweeps.ledger.claims import Claims, Entry, decide, holders
from sweeps.ledger.storage import Store

LAUNCHES = ("a", "b", "c")
KEYS = ("k", "l", "m")
keyed = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(("", "1", "2")))
logs = st.dictionaries(
    st.integers(0, 6), st.builds(Entry, launch=st.sampled_from(LAUNCHES), nonce=st.just(""), keys=keyed)
)


@given(logs)
def test_the_last_entry_that_names_a_key_holds_it(entries: dict[int, Entry]) -> None:
    held = holders(entries)
    for key in KEYS:
        naming = [number for number, entry in entries.items() if key in entry.keys]
        assert held.get(key) is (entries[max(naming)] if naming else None)


@given(logs, keyed, keyed, st.fixed_dictionaries({name: st.booleans() for name in LAUNCHES}))
def test_a_launch_gets_what_no_other_live_one_holds(
    entries: dict[int, Entry], wanted: dict[str, str], mine: dict[str, str], alive: dict[str, bool]
) -> None:
    held = holders(entries)
    alive["a"] = True
    decision = decide("a", wanted, mine, held, alive)
    blocked = {k: e.launch for k, e in held.items() if e.launch != "a" and alive[e.launch]}
    assert decision.ours == [k for k in wanted if k not in blocked]
    assert decision.others == {k: blocked[k] for k in wanted if k in blocked}
    assert decision.foreign == {
        k: launch
        for k, launch in decision.others.items()
        if "" not in (wanted[k], held[k].keys[k]) and wanted[k] != held[k].keys[k]
    }
    assert not decision.mine.keys() & blocked.keys()  # the entry that is written next names no key of a live launch
    assert {k: decision.mine[k] for k in decision.ours} == {k: wanted[k] for k in decision.ours}
    lost = {k for k, entry in held.items() if entry.launch != "a"}
    assert decision.mine.keys() - wanted.keys() == mine.keys() - wanted.keys() - lost
    # what was written is found: deciding again gives the same, and asks for no other entry
    written = entries | {max(entries, default=-1) + 1: Entry("a", "", decision.mine)}
    again = decide("a", wanted, decision.mine, holders(written), alive)
    assert (again.ours, again.others, again.mine, again.recorded) == (
        decision.ours,
        decision.others,
        decision.mine,
        True,
    )


@given(keyed)
def test_an_entry_reads_back_as_it_was_written(keys: dict[str, str]) -> None:
    entry = Entry("a", "n", keys)
    back = Entry.decoded(json.loads(entry.encoded()))
    assert back == entry
    assert list(back.keys) == list(keys)


class Turns:
    """Runs calls in threads, of which one at a time goes on: from one request of a store to the next."""

    def __init__(self) -> None:
        self._mine = threading.local()
        self._paused = threading.Semaphore(0)

    def request(self) -> None:
        """The moment before a request: the thread waits here for its turn."""
        if go := getattr(self._mine, "go", None):
            self._paused.release()
            go.acquire()

    def run(self, jobs: Sequence[Callable[[], None]], schedule: Sequence[int]) -> None:
        """Each number of the schedule lets that job go on by one request; then the jobs end one after the other."""
        turns = [threading.Semaphore(0) for _ in jobs]
        ended = [False] * len(jobs)

        def work(i: int) -> None:
            self._mine.go = turns[i]
            turns[i].acquire()
            try:
                jobs[i]()
            finally:
                ended[i] = True
                self._paused.release()

        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
        for thread in threads:
            thread.start()
        order = iter(schedule)
        while not all(ended):
            i = next(order, ended.index(False))
            if not ended[i]:
                turns[i].release()
                self._paused.acquire()


class MemoryStore:
    """What claims need of a store, with a turn before each request."""

    def __init__(self, turns: Turns) -> None:
        self.files: dict[str, bytes] = {}
        self._times: dict[str, float] = {}
        self._turns = turns

    def names(self, folder: str) -> list[str]:
        self._turns.request()
        return [name.removeprefix(f"{folder}/") for name in self.files if name.startswith(f"{folder}/")]

    def read_json(self, name: str) -> Any:
        self._turns.request()
        return json.loads(self.files[name]) if name in self.files else None

    def create(self, name: str, data: bytes) -> bool:
        self._turns.request()
        return self.files.setdefault(name, data) is data

    def replace(self, name: str, data: bytes) -> None:
        self._turns.request()
        self.files[name], self._times[name] = data, time.time()

    def modified(self, name: str) -> float:
        return self._times[name]

    def remove_file(self, name: str) -> None:
        self._turns.request()
        self.files.pop(name, None)


# launch 0 lists the log; launch 1 claims three times, so that the number which launch 0 saw as next is free again below
# the highest; launch 2 lists; launch 0 makes its entry, looks again and ends its claim; launch 2 makes its own
_ANEW = ([["k"]], [["l"], ["m"], ["n"]], [["k"]])
_ANEW_TURNS = [0] * 2 + [1] * 60 + [2] * 4 + [0] * 60 + [2] * 60


@given(
    st.tuples(*[st.lists(st.lists(st.sampled_from("klmn"), min_size=1, unique=True), max_size=3)] * 3),
    st.lists(st.integers(0, 2), max_size=60),
    st.sets(st.integers(0, 2)),
)
@example(_ANEW, _ANEW_TURNS, set())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_two_live_launches_get_the_same_key(
    claims: tuple[list[list[str]], ...], schedule: list[int], dying: set[int]
) -> None:
    """In every order of their requests; some launches die after their last claim, without releasing anything."""
    turns = Turns()
    store = MemoryStore(turns)
    launches = [Claims(cast("Store", store)) for _ in claims]
    got: dict[str, str] = {}  # {key: live launch that was given it}

    def job(i: int) -> None:
        own = launches[i].launch_id
        for keys in claims[i]:
            ours, others = launches[i].claim(keys)
            assert [*ours, *others] == keys or set(ours) | others.keys() == set(keys)
            for key in ours:
                assert got.setdefault(key, own) == own
        if i in dying:
            store.files.pop(f"_claims/launches/{own}.json")
            for key in [k for k, launch in got.items() if launch == own]:
                del got[key]

    failed: list[BaseException] = []

    def caught(i: int) -> None:
        try:
            job(i)
        except BaseException as error:
            failed.append(error)

    try:
        turns.run([lambda i=i: caught(i) for i in range(3)], schedule)  # type: ignore[misc]
        assert not failed, failed
        entries = {int(n[:-5]): store.files[f"_claims/cells/{n}"] for n in store.names("_claims/cells")}
        held = holders({n: Entry.decoded(json.loads(data)) for n, data in entries.items()})
        assert {key: held[key].launch for key in got} == got
    finally:
        for launch in launches:
            launch.release()
