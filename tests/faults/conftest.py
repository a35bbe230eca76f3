"""The fault harness: $PLUMBLINE_FAULT_SEED chooses the schedules, $PLUMBLINE_FAULT_RECORD keeps what was survived."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).with_name("site"))]

import objectstore  # noqa: E402
from fault_rig import ROOT, Launches, Survived  # noqa: E402
from fault_sweeps import SWEEPS  # noqa: E402
from fault_warm import Bench, MakeBench, References, Warm  # noqa: E402

objectstore.register()


@pytest.fixture
def survived(record_property: Callable[[str, object], None]) -> Survived:
    return Survived(lambda injection: record_property("survived", injection))


@pytest.fixture
def launches(tmp_path: Path, cache: Path, database: Path) -> Iterator[Launches]:
    """Launches in a folder of this test; none of their processes survives it."""
    (tmp_path / "runs").mkdir(exist_ok=True)
    shutil.copy(database, tmp_path / "runs" / "mlflow.db")
    these = Launches(tmp_path, PLUMBLINE_CACHE=str(cache))
    yield these
    these.close()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is made once per machine; compiled kernels stay in the checkout's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights and random text for proxy_gap."""
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="session")
def warm(cache: Path) -> Iterator[Warm]:
    """The process from which launches are forked, without the start of Python and Ray."""
    process = Warm(ROOT, cache)
    yield process
    process.close()


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with empty tables, which takes many seconds to make."""
    from mlflow.tracking import MlflowClient

    from sweeps.launch.mlflow_store import alone

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with alone(file):
        MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def bench(warm: Warm, launches: Launches, sources: Path, database: Path) -> MakeBench:
    """Makes the folder in which one sweep is launched again and again; place: its name, or the test's own."""

    def make(sweep: str, objects: bool = False, place: str = "", **changes: object) -> Bench:
        tiny = SWEEPS[sweep](sources, **changes)
        folder = launches.folder / place
        folder.mkdir(exist_ok=True)
        return Bench(warm, Launches(folder), tiny, sources=sources, database=database, objects=objects)

    return make


@pytest.fixture(scope="session")
def reference(warm: Warm, sources: Path, database: Path, tmp_path_factory: pytest.TempPathFactory) -> References:
    """Results of undisturbed launches by the name of their sweep; the tests on Ray must give the same bits."""
    return References(warm, tmp_path_factory.mktemp("reference"), sources, database)
