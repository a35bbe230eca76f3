"""Values of --set: whole numbers exactly, or one line that says why not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sweeps.core.cells import UserError
from sweeps.core.settings import apply_settings


@dataclass(frozen=True)
class Some:
    n: int = 1
    x: float = 1.0
    many: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("text", "n"),
    [("2e6", 2_000_000), ("4.0", 4), ("1_000", 1000), ("9007199254740993", 2**53 + 1), ("-3", -3)],
)
def test_whole_numbers_are_exact(text: str, n: int) -> None:
    assert apply_settings([f"n={text}", f"many=1,{text}"], Some()) == [Some(n=n, many=(1, n))]


@pytest.mark.parametrize("text", ["n=inf", "n=1e400", "n=nan", "n=1.5", "n=x", "n=", "x=y", "x=1e400", "many=1,inf"])
def test_what_is_no_number_of_its_kind_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=rf"--set {text.split('=')[0]}=") as refused:
        apply_settings([text], Some())
    assert "\n" not in str(refused.value)
