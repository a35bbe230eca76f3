"""Stores for tests of the ledger (a folder, memory, S3 as a server here plays it), and launches on one shared Ray."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    changed = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    import fsspec

    fsspec.filesystem("s3").mkdir("plumbline-test")
    yield "s3://plumbline-test"
    server.stop()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def codec_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which the stand-in codec and the tokens of small corpora are made once for several files."""
    return tmp_path_factory.mktemp("codec-cache")


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"


@dataclass(frozen=True)
class Outcome:
    """Of one launch: its exit code, and what it printed."""

    code: int
    out: str
    err: str


Launch = Callable[..., Outcome]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Ray of this machine alone for those launches of a file that do not kill it, with a cache folder of its own."""
    from sweeps.core.machine import user_cache
    from sweeps.launch import ray_session

    with pytest.MonkeyPatch.context() as patch:
        tables, cache = user_cache() / "mlflow", tmp_path_factory.mktemp("cache")
        tables.mkdir(parents=True, exist_ok=True)
        (cache / "mlflow").symlink_to(tables)  # MLflow's tables take many seconds to make
        patch.setenv("PLUMBLINE_CACHE", str(cache))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield ray_session.connect(None, str(tmp_path_factory.getbasetemp()))
        ray_session.shutdown_ray()


@pytest.fixture
def launch(
    machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Launch]:
    """(sweep, *arguments): the command line in this process, in the test's folder, on the Ray that is there."""
    from sweeps.launch import command

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "connect", lambda *a: machine)
    monkeypatch.setattr(command, "shutdown_ray", lambda: None)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)

    def call(sweep: Any, *arguments: str) -> Outcome:
        capfd.readouterr()
        return Outcome(command.main(sweep, list(arguments)), *capfd.readouterr())

    yield call
    for number, handler in zip((signal.SIGTERM, signal.SIGHUP), before, strict=True):
        signal.signal(number, handler)
