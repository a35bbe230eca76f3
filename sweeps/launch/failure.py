"""Errors in one line: which are permanent, and why a worker died, with the rule that it broke and the remedy."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

from sweeps.core.cells import Pack, UserError
from sweeps.launch.same_code import OTHER_CODE

_MEMORY = re.compile(
    r"node running low on memory.*?\(IP: (?P<node>[^,)]+).*?was (?P<used>\S+) used / (?P<limit>\S+) limit "
    r"\((?P<share>[\d.]+)\)",
    re.DOTALL,
)
_THRESHOLD = re.compile(r"exceeded threshold of \d+B \((?P<percent>[\d.]+)%")
_DEAD = re.compile(r"The actor died|The actor is dead|The worker died|The actor \S+ is unavailable|node is either dead")
_OTHER_CODE = re.compile(rf"a worker on [^\n]*{OTHER_CODE}[^\n]*")
_DETAIL = re.compile(r"Worker exit detail: (?P<why>[^.]+)\.")


def death(text: str, pack: Pack) -> str | None:
    """The line for a worker of `pack` that ended with Ray's error `text`; None where it was no death but an error.

    Out of memory: Ray's memory monitor killed it. `node running low on memory` is the text of `OutOfMemoryError` in
    Ray 2.60, which `ray.get` raises and Tune and Train hand on as text.
    """
    if "low on memory" in text:
        return f"Ray killed its worker, {_usage(text)}; {_remedy(pack)}"
    if _DEAD.search(text) and "Traceback" not in text:  # a worker that writes one met the death of another
        why = _DETAIL.search(text)
        return f"its worker died ({' '.join(why['why'].split())})" if why else "its worker died"
    return None


def refusal(text: str) -> str | None:
    """The line of a worker that would have run other code than its launch; None where there is none in `text`."""
    found = _OTHER_CODE.search(text)
    return found[0].strip() if found else None


def _usage(text: str) -> str:
    found, rule = _MEMORY.search(text), _THRESHOLD.search(text)
    if not found:
        return "since the node's memory ran out"
    above = f" and Ray kills above {float(rule['percent']):g}%" if rule else ""
    percent = 100 * float(found["share"])
    return f"since node {found['node']} used {found['used']} of {found['limit']} memory ({percent:.0f}%){above}"


def _remedy(pack: Pack) -> str:
    if pack.workers > 1:
        return f"choose fewer workers with --set workers={pack.workers // 2}, or a node with more memory"
    if len(pack.cells) > 1:
        return f"choose smaller packs with --set cells_per_pack={len(pack.cells) // 2}, or a node with more memory"
    fewer = max(2, round(2 * pack.cpus))
    return f"run fewer packs at once with --set threads={fewer} (CPUs a pack), or choose a node with more memory"


def last_failure(text: str) -> str:
    """The newest section of the error file that Tune keeps a trial: `Failure # 2 (occurred at …)` heads each."""
    return re.split(r"^Failure # \d+ \(occurred at [^)]*\)\n", text, flags=re.MULTILINE)[-1].strip()


_PERMANENT = (UserError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError, ImportError)
# how Python writes what the storage or the machine refused, and how a pack ends whose node is taken away
SYSTEM_ERROR = re.compile(r"\[Errno \d+\]|SIGTERM: ")


def one_line(error: BaseException) -> str:
    """The error as one line; the type is left out where the text speaks for itself."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) and text else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class Permanent:
    """An error that a retry cannot mend, in one line.

    refused: no fault of the cells', which stay missing: the worker would have run other code than its launch.
    """

    line: str
    refused: bool


def settle(error: Exception) -> Permanent:
    """What is done about an error of a pack's work, in its trial and on Ray Train's workers alike.

    Raises it again where a retry may mend it. The traceback of an error that is not the user's is printed.
    """
    if (line := refusal(str(error))) is not None:
        return Permanent(line, refused=True)
    if not isinstance(error, _PERMANENT):
        raise error
    if not isinstance(error, UserError):
        traceback.print_exception(error)
    return Permanent(one_line(error), refused=False)
