"""The arrows of the design: data, models and analysis never import each other; imports go
down the floors of `sweeps`; nothing shadows a package."""

from __future__ import annotations

import ast
import functools
import importlib.util
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
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
    folder = ROOT / "sweeps"
    rooms = {p.name for p in folder.iterdir() if (p / "__init__.py").is_file()}
    stems = {p.stem for p in folder.glob("*.py")} - {"__init__"} | rooms
    assert "proxy_gap" in stems
    assert [s for s in stems if s in sys.stdlib_module_names or importlib.util.find_spec(s)] == []


FLOORS = {"core": 0, "ledger": 1, "search": 2, "launch": 3, "sae": 4, "topology": 4, "codec": 4, "caching": 5}
COMMANDS = 6
MOST_MODULES = 24  # of a room


def modules() -> dict[str, Path]:
    """Every module of the four packages, by its name."""
    files = [file for package in ROOMS for file in (ROOT / package).rglob("*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


@functools.cache
def arrows() -> dict[str, set[str]]:
    """What each module imports: at its head, in functions and under TYPE_CHECKING."""
    known = modules()
    out: dict[str, set[str]] = {name: set() for name in known}
    for name, file in known.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            found: list[str] = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                parts = [f"{node.module}.{alias.name}" for alias in node.names]
                found = [part if part in known else node.module for part in parts]
            out[name] |= {one for one in found if one in known and one != name}
    return out


def room(module: str) -> str:
    """`sweeps.ledger` of `sweeps.ledger.claims`; a module at the head of its package is of no room."""
    return ".".join(module.split(".")[:2]) if module.count(".") > 1 else module.split(".")[0]


def floor(module: str) -> int:
    parts = module.split(".")
    return FLOORS[parts[1]] if len(parts) > 2 else COMMANDS


def test_modules_import_in_no_circle() -> None:
    TopologicalSorter(arrows()).prepare()  # raises CycleError, which names the circle


def test_rooms_import_in_no_circle() -> None:
    between: dict[str, set[str]] = {}
    for module, imported_ones in arrows().items():
        between.setdefault(room(module), set()).update({room(m) for m in imported_ones} - {room(module)})
    TopologicalSorter(between).prepare()


def test_imports_inside_sweeps_go_down() -> None:
    rooms = {p.name for p in (ROOT / "sweeps").iterdir() if (p / "__init__.py").is_file()}
    assert rooms == set(FLOORS)
    for module, imported_ones in arrows().items():
        for other in (m for m in imported_ones if m.startswith("sweeps.") and m.count(".") > 1):
            if module.startswith("sweeps.") and room(module) != room(other):
                assert floor(module) > floor(other), f"{module} imports {other}, which is not below it"


def test_core_imports_nothing_else_of_the_project() -> None:
    outside = {(m, o) for m, some in arrows().items() if room(m) == "sweeps.core" for o in some if room(o) != room(m)}
    assert outside == set()


def test_rooms_are_small() -> None:
    sizes = Counter(room(module) for module in modules() if module.count(".") > 1)
    assert {name: size for name, size in sizes.items() if size > MOST_MODULES} == {}


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


def test_reports_of_saes_and_topology_load_neither_torch_nor_ray() -> None:
    script = (
        "import sys; import sweeps.launch.command, sweeps.sae.report, sweeps.topology.report; "
        "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "[]"


KERNELS = ("models/ops/", "models/cpu/", "models/sae/", "models/codec/compiled/", "models/information/pairs.py")
KERNELS += ("analysis/topology/rips_h1.py",)
LONGEST, MOST_PARAMETERS = 60, 8


def test_functions_fit_a_screen() -> None:
    """Kernels are long for a reason, and an autograd function's forward takes what its kernel takes."""
    wide = []
    for file in (f for package in ROOMS for f in (ROOT / package).rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or name.startswith(KERNELS):
                continue
            a, lines = node.args, (node.end_lineno or 0) - node.lineno + 1
            parameters = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs) if p.arg not in ("self", "cls")]
            autograd = parameters[:1] == ["ctx"]
            if lines > LONGEST or (len(parameters) > MOST_PARAMETERS and not autograd):
                wide.append(f"{name}:{node.name} {lines} lines, {len(parameters)} parameters")
    assert wide == []
