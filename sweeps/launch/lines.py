"""Lines for whoever reads: without control characters, wrapped on a terminal, and harmless when nobody is there."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import textwrap
from collections.abc import Iterable
from typing import IO

from rich.console import Console

LABEL = 13  # columns before the text of a line such as `report       runs/reports/…`
_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


class Screen(Console):
    """A console whose reader may go away; rich would end the whole process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Whole(str):
    """A line that is copied as it is, a command or an address: never wrapped."""


def plain(text: str) -> str:
    """A text without control characters: names and errors come from files, and a log or a terminal obeys them."""
    return _ESCAPES.sub("", text)


def interactive(stream: IO[str] | None) -> bool:
    """Whether somebody watches who can be shown a table that changes: a terminal that is not `dumb`.

    None: a stream that was closed before this process began.
    """
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
    except ValueError:  # closed
        return False


def tell(lines: Iterable[str], *, error: bool = False) -> None:
    """Print lines, wrapped below their label on a terminal; whole elsewhere, and where they are `Whole`.

    A stream that is gone gets nothing, and the launch goes on.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    try:
        width = Screen(file=stream).width if interactive(stream) else 0
        for line in lines:
            whole = not width or isinstance(line, Whole)
            print(plain(line) if whole else "\n".join(wrapped(plain(line), width)), file=stream, flush=True)
    except (BrokenPipeError, ValueError):
        silence(stream)
    except OSError:  # a full disk, say: the next line may go through
        return


def labelled(label: str, texts: Iterable[str]) -> list[str]:
    """Texts as lines of the screen, the label before the first."""
    return [f"{'' if i else label:{LABEL}}{text}" for i, text in enumerate(texts)]


def wrapped(line: str, width: int) -> list[str]:
    """A line in lines of at most `width` columns, but for words that are longer, such as addresses."""
    labelled = line[LABEL - 2 : LABEL].isspace() and line[LABEL : LABEL + 1].strip()
    indent = LABEL if labelled else len(line) - len(line.lstrip()) + 2
    if width < 4 * indent:
        indent = 2
    parts = textwrap.wrap(
        line,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    )
    return parts or [""]


def silence(stream: IO[str]) -> None:
    """Send what is still to be printed nowhere: the reader of a pipe, or the terminal, is gone."""
    quiet = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - stays open instead of the stream
    with contextlib.suppress(OSError, ValueError):
        os.dup2(quiet.fileno(), stream.fileno())
    if stream is sys.stdout:
        sys.stdout = quiet
    elif stream is sys.stderr:
        sys.stderr = quiet
