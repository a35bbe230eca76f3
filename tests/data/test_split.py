from __future__ import annotations

import pytest

from data.split import identity_hash, side_of


def test_share_is_binomial_and_depends_on_the_name_alone() -> None:
    names = [f"LJ{i:06d}" for i in range(20_000)]
    sides = {n: side_of(n) for n in names}
    held = sum(s == "validation" for s in sides.values())
    assert abs(held - 1_000) < 5 * (20_000 * 0.05 * 0.95) ** 0.5
    assert {n: side_of(n) for n in reversed(names[::7])} == {n: sides[n] for n in names[::7]}


def test_growing_the_holdout_only_moves_training_items() -> None:
    names = [str(i) for i in range(3_000)]
    small = {n for n in names if side_of(n, holdout=0.05) == "validation"}
    large = {n for n in names if side_of(n, holdout=0.2) == "validation"}
    assert small < large


def test_hash_is_pinned_because_it_defines_every_published_split() -> None:
    # BLAKE2b-64 of the ASCII name, from the reference implementation's parameters
    import hashlib

    expected = int.from_bytes(hashlib.blake2b(b"LJ001-0001", digest_size=8).digest(), "big")
    assert identity_hash("LJ001-0001") == expected
    assert identity_hash("LJ001-0001", salt="b") != expected


@pytest.mark.parametrize("holdout", [-0.1, 1.0, 2.0])
def test_impossible_share(holdout: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        side_of("a", holdout=holdout)


def test_parts_are_disjoint_shares_and_the_first_is_the_usual_one() -> None:
    names = [f"recording {i}" for i in range(4000)]
    held_out = [{n for n in names if side_of(n, holdout=0.2, part=part) == "validation"} for part in range(5)]
    assert held_out[0] == {n for n in names if side_of(n, holdout=0.2) == "validation"}
    assert sum(map(len, held_out)) == len(set().union(*held_out)) == len(names)
    assert all(abs(len(part) - 800) < 120 for part in held_out)
    for part in (-1, 5):
        with pytest.raises(ValueError, match="must lie within the whole"):
            side_of("a", holdout=0.2, part=part)
