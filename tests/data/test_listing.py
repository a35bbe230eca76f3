"""Names that editors, archivers and unfinished copies leave among data are recognised and counted."""

from __future__ import annotations

from data._listing import is_hidden, skipped_line, visible


def test_hidden_names_are_those_with_a_part_that_begins_with_a_dot_or_underscore() -> None:
    names = [
        *("a.parquet", ".ipynb_checkpoints/a-checkpoint.parquet", "._a.parquet", "deep/_temporary/b.parquet"),
        *("__MACOSX/wavs/._1.wav", "_SUCCESS", "sub/a_b.parquet", "v1.2/c.parquet"),
    ]
    kept, hidden = visible(names)
    assert kept == ["a.parquet", "sub/a_b.parquet", "v1.2/c.parquet"]
    assert hidden == [n for n in names if n not in kept]
    assert all(map(is_hidden, hidden))


def test_the_line_counts_them_and_shows_the_first() -> None:
    assert skipped_line([]) == ""
    assert skipped_line([".a"], "shard") == "skipped 1 shard whose path has a part that begins with . or _: .a"
    line = skipped_line([".a", ".b", ".c", ".d"], "shard")
    assert line == "skipped 4 shards whose path has a part that begins with . or _: .a, .b, .c, …"
