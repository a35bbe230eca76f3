"""Checkpoints of unfinished work, kept in the ledger until the cell is published."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from sweeps.ledger.storage import Facts, Store, facts_of

_KINDS = ("latest", "best")


class WorkStore:
    """Checkpoints of unfinished work under `_work/` of the ledger: for each name the latest and, if asked, the best.

    A checkpoint is a torch file with a name of its own; the pointer of its kind (a small JSON, replaced last) names the
    file, its size and SHA-256, and the fingerprint of the code and data that it was made with. A crash or a full disk
    at any moment leaves the old pointer and the old file, and so does another process that writes the same name.
    Loading is weights-only: no pickled code is ever run. State passes through one file, never a second copy in memory:
    what `load` returns is mapped from the file, and takes memory only as it is copied to where it is used.

    `origin` is that fingerprint where a name does not follow from it already. A checkpoint of another origin is not
    continued, one that was made with another number of `threads` is, and `say` is called with a line on either.
    `reached` is called for each step that is further than the checkpoint before it.
    """

    def __init__(
        self,
        store: Store,
        say: Callable[[str], None] = lambda line: None,
        threads: int = 0,
        reached: Callable[[str], None] = lambda place: None,
    ) -> None:
        self.store, self._say, self._threads, self._reached = store, say, threads, reached

    def save(self, name: str, step: int, state: Mapping[str, Any], kind: str = "latest", origin: str = "") -> None:
        """Keep `state` (tensors, numbers, texts, nested dicts and lists) as the one checkpoint of its kind of `name`.

        Raises OSError where it cannot be written; the checkpoint before it stays.
        """
        import torch  # here, since the driver imports this module too and starts two seconds sooner without torch

        old = self._pointer(name, kind)
        file = f"{kind}-{step:012d}-{uuid.uuid4().hex[:12]}.pt"
        with self.store.aside(f"_work/{name}/{file}") as made:
            with open(made, "wb") as out:
                tape = _Tape(out)
                try:
                    torch.save(dict(state), cast("IO[bytes]", tape))
                except Exception:
                    if tape.error is not None:
                        raise tape.error from None
                    raise
            known = facts_of(made)
            self.store.replace(f"_work/{name}/{file}", made)
        pointer = {"file": file, "step": step, "bytes": known.size, "sha256": known.sha256}
        pointer |= {"origin": origin, "threads": self._threads}
        self.store.replace(f"_work/{name}/{kind}.json", json.dumps(pointer).encode())
        if old and old["file"] not in self._named(name):
            self.store.remove_file(f"_work/{name}/{old['file']}")
        if kind == "latest" and step > (old["step"] if old else 0):
            self._reached(f"{name} {step}")

    def _pointer(self, name: str, kind: str) -> dict[str, Any] | None:
        return self.store.read_json(f"_work/{name}/{kind}.json")

    def _named(self, name: str) -> set[str]:
        """Files that the pointers of a name lead to now."""
        found = (self._pointer(name, kind) for kind in _KINDS)
        return {str(pointer["file"]) for pointer in found if pointer}

    def step(self, name: str, kind: str = "latest") -> int:
        """Step of the checkpoint of a kind, 0 where there is none."""
        pointer = self._pointer(name, kind)
        return int(pointer["step"]) if pointer else 0

    def load(self, name: str, kind: str = "latest", origin: str | None = None) -> dict[str, Any] | None:
        """The whole checkpoint of a kind of `name`, or None; one that is damaged, missing or of another origin (where
        one is given) counts as none, which `say` reports.
        """
        import torch

        pointer = self._pointer(name, kind)
        if pointer is None:
            return None
        if origin is not None and pointer.get("origin", "") != origin:
            self._say(
                f"checkpoint of {name} at step {pointer['step']} was made with other code or data: starting again"
            )
            return None
        if (before := pointer.get("threads", self._threads)) != self._threads:
            self._say(
                f"step {pointer['step']} of {name} was reached with {before} threads, now there are {self._threads}; "
                f"the numbers change by rounding (--set threads={before} keeps them)"
            )
        place = f"_work/{name}/{pointer['file']}"
        try:
            with self.store.fetched(place) as file:
                if not _as_saved(file, pointer):
                    self._say(f"checkpoint of {name} at step {pointer['step']} is damaged: starting again")
                    return None
                return torch.load(file, weights_only=True, mmap=True)
        except FileNotFoundError:
            self._say(f"checkpoint of {name} at step {pointer['step']} is missing: starting again")
            return None

    def names(self) -> list[str]:
        """Names that have a checkpoint, or had one."""
        return self.store.names("_work")

    def drop(self, name: str) -> None:
        """Forget the checkpoints of finished work."""
        self.store.remove(f"_work/{name}")


class _Tape:
    """A file for torch that keeps the OSError of a write (a full disk), which torch turns into a RuntimeError."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._out.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._out.flush()


def _as_saved(file: Path, pointer: Mapping[str, Any]) -> bool:
    """Whether the file is the one that the pointer names; old pointers have no digest."""
    if "sha256" not in pointer:
        return file.stat().st_size == pointer["bytes"]
    return facts_of(file) == Facts(pointer["bytes"], pointer["sha256"])
