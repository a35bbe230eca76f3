"""How work hears that it should stop, so that it can save before it ends.

A launch that is told to stop leaves a flag in the ledger's store; every process that works for it sees the flag,
on whatever node. A process that gets SIGTERM itself (its node is about to be taken away) notes that. Both are obeyed
at the next safe point, a step or a cell: checkpoint, then `PackStopped`. A second SIGTERM ends a process at once.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sweeps.ledger.storage import Store

POLL_SECONDS = 1.0
_AGAIN_SECONDS = 0.05
_terminated = threading.Event()
_under_way: list[None] = []  # one entry for each `working` block that is open


class PackStopped(Exception):
    """The pack ended at a safe point, as it was asked to; what it had done is published or in its checkpoint."""


class _Note:
    """Signal handler that notes the first SIGTERM while work is under way, and leaves every other to `previous`."""

    def __init__(self, previous: Any) -> None:
        self.previous = previous

    def __call__(self, signum: int, frame: Any) -> None:
        if _terminated.is_set() or not _under_way:
            signal.signal(signum, self.previous)
            signal.raise_signal(signum)
        _terminated.set()


def listen() -> None:
    """Note SIGTERM from now on; to be called in the main thread. Without work under way SIGTERM does what it did."""
    previous = signal.getsignal(signal.SIGTERM)
    if not isinstance(previous, _Note):
        signal.signal(signal.SIGTERM, _Note(previous))
        sys.unraisablehook = _exit_again


def _exit_again(lost: sys.UnraisableHookArgs) -> None:
    """Hook for exceptions that nobody can catch; an exit among them is asked for again.

    Ray's handler of SIGTERM raises SystemExit wherever the process is. In a callback of the garbage collector Python
    would print that with a traceback, forget it and go on.
    """
    if not issubclass(lost.exc_type, SystemExit):
        sys.__unraisablehook__(lost)
        return
    again = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGTERM))
    again.daemon = True
    again.start()


def terminated() -> bool:
    """Whether this process got SIGTERM while it worked."""
    return _terminated.is_set()


@contextmanager
def working() -> Iterator[None]:
    """Work that reaches safe points is under way: SIGTERM waits for the next one."""
    _under_way.append(None)
    try:
        yield
    finally:
        _under_way.pop()


class StopFlag:
    """Whether one of some flags was raised in a store; a thread looks every second, starting with the first question.

    A store that does not answer counts as no flag: the work goes on and meets the trouble itself.
    """

    def __init__(self, store: Store, names: Sequence[str]) -> None:
        self.store, self.names = store, tuple(names)
        self._seen, self._closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def raised(self) -> bool:
        if self._thread is None and self.names and not self._closed.is_set():
            self._look()  # at once, so that work which starts after the flag does nothing
            self._thread = threading.Thread(target=self._watch, name="stop-flag", daemon=True)
            self._thread.start()
        return self._seen.is_set()

    def close(self) -> None:
        """Stop asking the storage: the work is over. The next question gets the last answer."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS) and not self._seen.is_set():
            self._look()

    def _look(self) -> None:
        try:
            if any(self.store.exists(flag_path(name)) for name in self.names):
                self._seen.set()
        except Exception:
            return


def flag_path(name: str) -> str:
    """Where a flag lies in the store."""
    return f"_stop/{name}"


def raise_flag(store: Store, name: str) -> None:
    """Ask all that work under `name` (a launch, a pack of it) to stop."""
    store.replace(flag_path(name), b"")


def lower_flag(store: Store, name: str) -> None:
    """Remove a flag; nothing happens where there is none."""
    store.remove(flag_path(name))


class Stopper:
    """Handler of a launch's SIGTERM, SIGHUP and SIGINT: the packs that run get time to save, then the launch ends.

    The first signal inside `asking` raises the launch's flag; when the packs have ended, or the grace is over,
    KeyboardInterrupt is raised there. A second signal, or one outside `asking`, raises it at once.
    terminated: whether a SIGTERM or SIGHUP (a closed terminal) was among them, whose sender may not wait.
    """

    def __init__(self) -> None:
        self.terminated = False
        self._ask: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None
        self._asked = threading.Event()

    def install(self) -> None:
        """Handle these signals from now on; to be called in the main thread. A launch under nohup ignores SIGHUP."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self)

    def __call__(self, signum: int, frame: Any) -> None:
        self.terminated |= signum in (signal.SIGTERM, signal.SIGHUP)
        if self._ask is None or self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()
        self._thread = threading.Thread(target=self._ask, name="stop", daemon=True)  # a handler must not wait
        self._thread.start()

    @contextmanager
    def asking(self, store: Store, launch: str, grace: float, say: Callable[[str], None]) -> Iterator[None]:
        """Packs of `launch` run in this block, in the main thread."""
        over = threading.Event()

        def ask() -> None:
            say(f"stopping: up to {grace:g} s for running packs to save; a second signal stops at once")
            with suppress(OSError):
                raise_flag(store, launch)
            if not over.wait(grace):
                _thread.interrupt_main()

        self.install()  # again: a Ray that starts puts its own handler of SIGTERM in place
        self._ask = ask
        try:
            yield
            if self._asked.is_set():
                raise KeyboardInterrupt
        finally:
            over.set()
            self._ask = None
            if self._thread is not None:
                self._thread.join()  # else it may raise the flag after it was lowered
                with suppress(OSError):
                    lower_flag(store, launch)
