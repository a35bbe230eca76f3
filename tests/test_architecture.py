"""The arrows of the design: data, models and analysis never import each other; nothing shadows a package."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("data", "models", "analysis", "sweeps")


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", ["data", "models", "analysis"])
def test_rooms_import_no_other_room(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert len(files) > 3
    for file in files:
        wrong = imported(file) & (set(ROOMS) - {room})
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_no_sweep_module_shadows_a_package() -> None:
    stems = {p.stem for p in (ROOT / "sweeps").glob("*.py")} - {"__init__"}
    assert "proxy_gap" in stems
    assert [s for s in stems if s in sys.stdlib_module_names or importlib.util.find_spec(s)] == []


def test_files_are_of_one_idea() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.split():
        assert len((ROOT / name).read_text().splitlines()) <= 600, name


def test_lock_names_no_address_and_holds_every_package() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    for name in ("ray", "torch", "flash-linear-attention", "transformer-lens", "sae-lens", "encodec"):
        assert f"\n{name}==" in f"\n{lock}"
    for name in ("descript-audio-codec", "ripser", "rdkit", "mlflow", "pytest"):
        assert f"\n{name}==" in f"\n{lock}"


def without_encoding(file: Path) -> list[str]:
    """Calls that read, write or hear text in whatever encoding the user's locale has."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        named = {k.arg for k in node.keywords}
        modes = [a.value for a in [*node.args[1:2], *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        opened = isinstance(node.func, ast.Name) and name == "open" and not any("b" in str(m) for m in modes)
        written = (name == "read_text" and not node.args) or (name == "write_text" and len(node.args) == 1)
        if (opened or written or ("text" in named and name in ("run", "Popen"))) and "encoding" not in named:
            found.append(f"{file.relative_to(ROOT)}:{node.lineno} {name}")
    return found


def test_text_has_an_encoding() -> None:
    files = [file for room in (*ROOMS, "benchmarks") for file in (ROOT / room).rglob("*.py")]
    assert [call for file in files for call in without_encoding(file)] == []
