"""Text files are cut at line feeds alone, whatever Unicode calls a line; test_architecture looks at encodings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.embeddings import load

ROOT = Path(__file__).resolve().parents[1]


def calls(*places: str) -> Iterator[tuple[str, str, ast.Call]]:
    """(file and line, name of the method or function, call) of every call."""
    for place in places:
        for file in (ROOT / place).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                    name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", name, node


def test_no_reader_of_data_cuts_lines_as_unicode_does() -> None:
    assert [where for where, name, _ in calls("data") if name == "splitlines"] == []


def test_ids_beside_a_matrix_keep_odd_characters(tmp_path: Path) -> None:
    ids = ["a\u2028b", "c\x85d", "e"]
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    (tmp_path / "x.ids.txt").write_bytes("\ufeff".encode() + "\r\n".join(ids).encode() + b"\r\n")
    assert load(tmp_path / "x.npy")[0] == ids
