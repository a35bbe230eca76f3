"""Passwords stay in memory, foreign files cannot run code, names cannot leave the ledger, servers stay on loopback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors import SafetensorError

from sweeps.core.cells import UserError
from sweeps.ledger import logins
from sweeps.ledger.checkpoints import WorkStore
from sweeps.ledger.storage import Store

ROOT = Path(__file__).resolve().parents[2]
WORD = "s3cr3t-Word"


@pytest.fixture
def no_logins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logins.VARIABLE, "{}")


class Fuse:
    """The same for torch packages, which know no pathlib."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.target, "w")


class Bomb:
    """An object whose unpickling creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def torch_bomb(target: Path) -> bytes:
    import torch

    out = io.BytesIO()
    torch.save({"state": Bomb(target)}, out)
    return out.getvalue()


def numpy_bomb(target: Path) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Bomb(target)], dtype=object), allow_pickle=True)
    return out.getvalue()


def test_the_bombs_are_live(tmp_path: Path) -> None:
    import torch

    torch.load(io.BytesIO(torch_bomb(tmp_path / "a")), weights_only=False)
    np.load(io.BytesIO(numpy_bomb(tmp_path / "b")), allow_pickle=True)
    pickle.loads(pickle.dumps(Bomb(tmp_path / "c")))
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "c"}


def _work_store(folder: Path, target: Path) -> None:
    store = Store(str(folder))
    data = torch_bomb(target)
    store.replace("_work/x/000000000001.pt", data)
    pointer = {"file": "000000000001.pt", "step": 1, "bytes": len(data)}
    store.replace("_work/x/latest.json", json.dumps(pointer).encode())
    WorkStore(store).load("x")


def _encodec(folder: Path, target: Path) -> None:
    from data.codec import CodecSpec

    (folder / "weights.pt").write_bytes(torch_bomb(target))
    CodecSpec(name="encodec", weights=str(folder / "weights.pt")).load()


def _dac_package(folder: Path, target: Path) -> None:
    """The format that descript-audio-codec's own loader tries first, and unpickles."""
    import torch
    from dac.model import DAC

    from data.codec import CodecSpec

    path = str(folder / "weights.pth")
    with torch.package.PackageExporter(path) as package:
        package.intern("**")
        package.extern(["pathlib", "tests.**", "test_security", "builtins"])
        package.save_pickle("DAC", "DAC.pth", Fuse(str(target)))
    with contextlib.suppress(Exception):
        DAC.load(path)
    assert target.exists(), "the bomb is a dud"
    target.unlink()
    CodecSpec(name="dac", weights=path).load()


def _codec_sample(folder: Path, target: Path) -> None:
    from sweeps.codec.checkpoint import read_checkpoint

    read_checkpoint(torch_bomb(target), "model.pt")


def _embedding(name: str) -> Callable[[Path, Path], None]:
    def load(folder: Path, target: Path) -> None:
        from data import embeddings

        if name.endswith("z"):
            np.savez(folder / name, ids=np.array(["a"]), embedding=np.array([Bomb(target)], dtype=object))
        else:
            (folder / name).write_bytes(numpy_bomb(target))
        (folder / "x.ids.txt").write_text("a\n")
        embeddings.load(folder / name)

    return load


def _melvq(folder: Path, target: Path) -> None:
    from data.melvq import MelVQ, MelVQSpec

    arrays: dict[str, Any] = {name: np.array([Bomb(target)], dtype=object) for name in MelVQSpec.__dataclass_fields__}
    np.savez(folder / "melvq.npz", mean=np.zeros(1), centroids=np.zeros(1), **arrays)
    MelVQ.load(folder / "melvq.npz")


def _diagrams(folder: Path, target: Path) -> None:
    from sweeps.topology.report import read_diagrams

    out = io.BytesIO()
    np.savez(out, lengths=np.array([1]), pairs=np.array([Bomb(target)], dtype=object))
    read_diagrams(out.getvalue())


def _member(folder: Path, target: Path) -> None:
    """Members of the odor model are read back as plain arrays."""
    from sweeps.core.cells import PublishedCell
    from sweeps.topology import report

    (folder / "embedding.npy").write_bytes(numpy_bomb(target))
    identity = {"kind": "member", "representation": "pom0", "table": "t"}
    cell = PublishedCell("k", identity, pd.DataFrame({"metric": [], "value": []}), (), str(folder), {})
    report._members([cell])


def _sae(folder: Path, target: Path) -> None:
    from models.sae.saelens import load_saelens

    config = {"architecture": "topk", "d_in": 4, "d_sae": 8, "k": 2}
    (folder / "cfg.json").write_text(json.dumps(config))
    (folder / "sae_weights.safetensors").write_bytes(pickle.dumps(Bomb(target)))
    load_saelens(folder)


ENTRIES: dict[str, Callable[[Path, Path], None]] = {
    "checkpoint of unfinished work": _work_store,
    "EnCodec weights": _encodec,
    "DAC weights as a torch package": _dac_package,
    "published language model": _codec_sample,
    "embedding .npz": _embedding("x.npz"),
    "embedding .npy": _embedding("x.npy"),
    "melvq weights": _melvq,
    "diagrams": _diagrams,
    "odor-model member": _member,
    "SAE": _sae,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_pickle_in_a_weights_file_is_refused_and_does_not_run(entry: str, tmp_path: Path) -> None:
    target = tmp_path / "exploded"
    (tmp_path / "in").mkdir()
    with pytest.raises((ValueError, pickle.UnpicklingError, SafetensorError, RuntimeError)):
        ENTRIES[entry](tmp_path / "in", target)
    assert not target.exists()


def test_every_loader_in_the_code_is_weights_only() -> None:
    """The grep a reviewer would do: no unpickling, torch.load only with weights_only=True, numpy never with pickles."""
    files = [p for d in ("analysis", "data", "models", "sweeps") for p in (ROOT / d).rglob("*.py")]
    assert len(files) > 50
    for file in files:
        text = file.read_text()
        for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text):
            assert "weights_only=True" in call, (file.name, call)
        assert "allow_pickle=True" not in text, file.name
        assert not re.search(
            r"\b(pickle|joblib|dill|cloudpickle)\.loads?\(|yaml\.(unsafe_)?load\(|torch\.jit\.load", text
        ), file


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/etc/outside"])
def test_file_names_cannot_leave_the_ledger(name: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "ledger"))
    with pytest.raises(ValueError, match=r"could lead out of .*only relative names"):
        store.publish_folder("cell", {name: b"x"})
    with pytest.raises(ValueError, match="could lead out of"):
        store.replace(name, b"x")
    assert [p.name for p in tmp_path.rglob("outside")] == []
    assert not store.published("cell")


@pytest.mark.usefixtures("no_logins")
def test_logins_are_cut_out_and_put_back_only_for_their_host() -> None:
    uri = f"sftp://user:{WORD}@host:22/a@b/c"
    assert logins.remember(uri) == "sftp://host:22/a@b/c"
    assert logins.with_login("sftp://host:22/other") == f"sftp://user:{WORD}@host:22/other"
    for other in ("sftp://host/a", "ftp://host:22/a", "/local/a@b", "s3://bucket/x@y", "memory://x"):
        assert logins.with_login(other) == other
        assert logins.remember(other) == other
    assert logins.clean_arguments(["--set", f"x=1,{uri}", "plain"]) == ["--set", "x=1,sftp://host:22/a@b/c", "plain"]
    assert logins.without_password("no answer from ftp://u:p@ss@host/x, sorry") == "no answer from ftp://host/x, sorry"
    logins.remember("http://me:p%40ss@mlflow:5000")
    assert logins.http_login("http://mlflow:5000") == ("me", "p@ss")


@pytest.mark.usefixtures("no_logins")
def test_a_login_in_the_environment_is_kept_as_one_on_the_command_line_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a launch prints, shows in MLflow and hands to Ray has no login; the ledger opens with it all the same."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for name, value in {
        "LOCKED_FOLDER": str(tmp_path),
        "LOCKED_WORD": WORD,
        "PLUMBLINE_STORAGE": f"locked://user:{WORD}@vault/ledger",
        "MLFLOW_TRACKING_URI": f"http://me:{WORD}@host:5000",
    }.items():
        monkeypatch.setenv(name, value)
    from locked_sweep import SWEEP

    from sweeps.launch import command as command_module
    from sweeps.launch.stop import Stopper

    launch = command_module._Launch(SWEEP, command_module.parser(SWEEP).parse_args([]), Stopper())
    assert launch.storage == launch.arguments.storage == "locked://vault/ledger"
    assert launch.tracking_uri == "http://host:5000"
    assert launch.done == set()
    assert logins.http_login(launch.tracking_uri) == ("me", WORD)


@pytest.mark.parametrize(
    "name",
    [
        *("password", "PWD", "access_token", "sslpassword", "pass", "aws_secret_access_key", "X-Amz-Signature"),
        *("api_key", "key", "SAS", "auth"),
    ],
)
def test_passwords_in_a_query_are_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"^--tracking-uri postgresql://h/db\?user=u has {name}=… after its '\?'"
    ) as refused:
        logins.given(f"postgresql://h/db?user=u&{name}={WORD}", "--tracking-uri")
    assert WORD not in str(refused.value)
    assert logins.given("postgresql://h/db?sslmode=require", "--tracking-uri").endswith("?sslmode=require")


@pytest.mark.parametrize("sign", ["/", "?", "#"])
def test_a_password_that_ends_its_address_early_is_refused_and_not_repeated(sign: str) -> None:
    uri = f"http://bob:{WORD[:3]}{sign}{WORD[3:]}@host:5000/x"
    with pytest.raises(UserError, match=r"^--tracking-uri has an @ after.*%2F, %3F, %23") as refused:
        logins.given(uri, "--tracking-uri")
    assert WORD[3:] not in str(refused.value)
    for plain in ("s3://bucket/x@y", "http://host:5000/a", "file:///home/a@b", "sftp://host/x?y=a@b"):
        assert logins.given(plain, "--storage") == plain


@pytest.mark.parametrize("uri", [f"http://bob:{WORD} x@host", f"bob:{WORD}@host/x", f"//bob:{WORD}@host/x"])
def test_a_login_with_a_blank_or_without_a_scheme_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UserError, match=r"^--storage has a login with a blank .*%20") as refused:
        logins.given(uri, "--storage")
    assert WORD not in str(refused.value)


@pytest.mark.parametrize("mark", [";", "#"])
def test_a_password_behind_other_marks_is_refused_and_not_repeated(mark: str) -> None:
    with pytest.raises(UserError, match="has token=…") as refused:
        logins.given(f"s3://bucket/x{mark}token={WORD}", "--storage")
    assert WORD not in str(refused.value)
    for plain in (
        "runs/ledger",
        "./a:b@c",
        "/mnt/x@y:z",
        "C/x y",
        "s3://bucket/x y@z",
        "file:///a b/c@d",
        "gs://b/k=1",
    ):
        assert logins.given(plain, "--storage") == plain


def test_a_login_in_a_chained_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="chained address with a login") as refused:
        logins.given(f"simplecache::http://bob:{WORD}@host/x", "--storage")
    assert WORD not in str(refused.value)
    with pytest.raises(UserError, match="chained address with a login"):
        logins.given(f"::http://bob:{WORD}@host/x", "--storage")
    assert logins.given("simplecache::s3://bucket/x", "--storage") == "simplecache::s3://bucket/x"


def test_servers_listen_on_loopback_unless_told() -> None:
    from sweeps.launch import pods, ray_session

    ui = next(line for line in re.split(r"\n(?=\S)", (ROOT / "Makefile").read_text()) if line.startswith("ui:"))
    assert "--host 127.0.0.1" in ui
    cluster = (ROOT / "cluster.yaml").read_text()
    assert cluster.count("--dashboard-host=127.0.0.1") == cluster.count("ray start --head")
    assert '"include_dashboard": False' in Path(ray_session.__file__).read_text()
    assert 'os.environ.get("PLUMBLINE_MLFLOW_HOST") or "127.0.0.1"' in Path(pods.__file__).read_text()


@pytest.fixture
def mlflow_stub() -> Iterator[tuple[str, list[str]]]:
    """A server that refuses everything and keeps the Authorization headers."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization", ""))
            body = json.dumps({"error_code": "PERMISSION_DENIED", "message": f"not {WORD[:2]}"}).encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def holders(folder: Path) -> list[str]:
    """Files below the folder that hold the password."""
    found = []
    for file in folder.rglob("*"):
        try:
            if file.is_file() and WORD.encode() in file.read_bytes():
                found.append(str(file))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_password_in_addresses_is_nowhere_on_disk_or_screen(mlflow_stub: tuple[str, list[str]]) -> None:
    """Killed in the middle, so that Ray's and Tune's folders are still there; then finished."""
    folder = Path(tempfile.mkdtemp(prefix="pl"))  # short: Ray's sockets lie in it
    driver: subprocess.Popen[bytes] | None = None
    try:
        host, seen = mlflow_stub
        (folder / "vault").mkdir()
        env = os.environ | {
            "TMPDIR": str(folder),
            "RAY_TMPDIR": str(folder),
            "LOCKED_FOLDER": str(folder / "vault"),
            "LOCKED_WORD": WORD,
        }
        env.pop("RAY_ADDRESS", None)
        command = [sys.executable, str(Path(__file__).with_name("locked_sweep.py"))]
        command += ["--storage", f"locked://user:{WORD}@vault/ledger", "--tracking-uri", f"http://me:{WORD}@{host}"]
        command += ["--set", "n=1,2,3,4", "--set", "pack_size=4"]
        slow = [*command, "--set", "seconds=4"]
        with open(folder / "out", "w") as out:
            driver = subprocess.Popen(slow, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT)
            deadline = time.monotonic() + 480
            marker = f"vault/ledger/toy/1/*/{'_PUBLISHED'}"
            while not list(folder.glob(marker)) and driver.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
            assert list(folder.glob(marker)), (folder / "out").read_text()
            shown = Path(f"/proc/{driver.pid}/cmdline").read_bytes()
            assert b"--storage" in shown
            assert WORD.encode() not in shown
            driver.send_signal(signal.SIGKILL)
            driver.wait()
        assert list(folder.glob("plumbline-tune-*/*")), "Tune wrote nothing to look at"
        at = command.index("--storage")  # the other way to name it
        env["PLUMBLINE_STORAGE"] = command[at + 1]
        del command[at : at + 2]
        again = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=480)
        assert again.returncode == 0, again.stderr
        assert "4/4 published" in again.stdout
        assert WORD not in again.stdout + again.stderr
        assert seen
        assert all(header.startswith("Basic ") for header in seen)
        assert holders(folder) == []
    finally:
        if driver and driver.poll() is None:
            driver.terminate()
            driver.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
