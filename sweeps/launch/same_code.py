"""The code that a launch runs: one digest, which every worker compares with that of the code it would run itself.

Ray's workers would look for modules in the folder that the launch was started from before they look into the checkout,
so `worker_job` and `worker_setup` tell them otherwise; and files may change while a launch runs.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data._launched import refuse
from sweeps.core.machine import ROOT

ROOMS = ("sweeps", "models", "data", "analysis")
VARIABLE = "PLUMBLINE_CODE"  # in a worker's environment: the digest of the launch's code
OTHER_CODE = "runs other code than its launch"


def code_digest(folders: Iterable[Path]) -> str:
    """SHA-256 (64 hex digits) of the names and contents of all Python files in these folders, each a package."""
    total = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            total.update(f"{content} {folder.name}/{file.relative_to(folder).as_posix()}\n".encode())
    return total.hexdigest()


@functools.cache
def own_code() -> str:
    """Digest of this process's checkout when it was first asked for: a launch asks before it imports its sweep."""
    return code_digest(ROOT / room for room in ROOMS)


def other_code(expected: str | None = None) -> str | None:
    """A line where this worker's code, as it is on disk now, is not the launch's; None where it is or nobody said.

    expected: the digest of the launch's code; else what the environment says.
    """
    expected = expected or os.environ.get(VARIABLE)
    if not expected:
        return None
    folders = [Path(importlib.import_module(room).__path__[0]) for room in ROOMS]
    if (found := code_digest(folders)) == expected:
        return None
    places = " and ".join(sorted({str(folder.parent) for folder in folders}))
    return (
        f"a worker on {platform.node()} {OTHER_CODE}: {found[:12]} in {places}, the launch {expected[:12]}; run the "
        "same command again when the checkout no longer changes"
    )


def guard() -> None:
    """Fix the packages of the checkout in this worker; its data tasks refuse where its code is not the launch's.

    A pack looks for itself (`other_code`), each time.
    """
    if (line := other_code()) is not None:
        refuse(line)


def worker_setup(root: str | None) -> Callable[[], None]:
    """What each worker calls before its first task, data tasks included; `root` None: the worker's own folder.

    A nested function, so that it travels by value: the worker cannot import it before it knows where from.
    """

    def setup() -> None:
        import importlib
        import os
        import sys

        sys.path.insert(0, root or os.getcwd())
        importlib.import_module("sweeps.launch.same_code").guard()

    return setup


def worker_job() -> Any:
    """Ray's job settings with which no worker looks for modules in the folder that the launch was started from."""
    from ray.job_config import JobConfig

    class Job(JobConfig):
        def _runtime_env_has_working_dir(self) -> bool:
            return True  # else Ray puts the driver's folder and that of its script before everything else

    return Job()
