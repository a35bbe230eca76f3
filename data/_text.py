"""Text files as bytes: the encoding by its mark, not by the locale; lines by line feeds alone.

`str.splitlines` also cuts at U+2028, U+0085, vertical tabs and form feeds, which are ordinary characters of a
transcript or a title.
"""

from __future__ import annotations

import codecs

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LOOKED_AT = 4096  # bytes from which an encoding without a mark is guessed
REPLACED = "\ufffd"


def decode_text(data: bytes) -> str:
    """UTF-8, or UTF-16 or UTF-32 by their byte order marks or zero bytes; stray bytes become `REPLACED`."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, errors="replace")
    return data.decode(_without_mark(data[:_LOOKED_AT]), errors="replace")


def _without_mark(start: bytes) -> str:
    """UTF-16 has a zero byte in each Latin character, UTF-8 text none at all."""
    zeros_even, zeros_odd = start[::2].count(0), start[1::2].count(0)
    if zeros_odd > len(start) // 8 and not zeros_even:
        return "utf-16-le"
    if zeros_even > len(start) // 8 and not zeros_odd:
        return "utf-16-be"
    return "utf-8"


def lines(text: str) -> list[str]:
    """The lines of a text, cut at LF and CR LF alone."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
