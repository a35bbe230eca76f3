"""`make venv`: pip's configuration reaches uv, torch for CPUs, and an installation from a folder without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from sweeps.core import set_up

LISTING = """:env:.find-links='/from/environment'
:env:.default-timeout='180'
global.find-links='/from/file /and/more'
global.index-url='https://me:word@one/simple'
global.extra-index-url='\\nhttps://two/simple\\nhttps://three/simple'
install.trusted-host='one two'
download.index-url='https://not-for-install/simple'
global.no-index='false'
"""


def test_uv_is_configured_as_pip_is() -> None:
    assert set_up.uvs_environment(set_up.pips_options(LISTING)) == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_DEFAULT_INDEX": "https://me:word@one/simple",
        "UV_INDEX": "https://two/simple https://three/simple",
        "UV_FIND_LINKS": "/from/environment",
        "UV_INSECURE_HOST": "one two",
        "UV_HTTP_TIMEOUT": "180",
    }
    assert set_up.uvs_environment({"find-links": "/a /b", "no-index": "true"}) == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/a,/b",
        "UV_NO_INDEX": "1",
    }


def test_lock_for_cpus() -> None:
    lock = ["numpy==1", "nvidia-x==2 ; sys_platform == 'linux'", "torch==3 ; sys_platform == 'linux'", "torch-stoi==4"]
    assert set_up.for_cpus([*lock, "torchaudio==5", "cuda-bindings==6"]) == [
        "numpy==1",
        "torch==3+cpu ; sys_platform == 'linux'",
        "torch-stoi==4",
        "torchaudio==5+cpu",
    ]
    whole = set_up.LOCK.read_text(encoding="utf-8").splitlines()
    assert sum("+cpu" in line for line in set_up.for_cpus(whole)) == 2
    assert len([line for line in whole if line.startswith("uv==")]) == 1


def wheel(folder: Path, name: str, version: str, tag: str = "py3-none-any", module: str = "") -> None:
    """A package of one module that holds its version, or this text."""
    home = f"{name}-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{home}-{tag}.whl", "w") as f:
        f.writestr(f"{name}.py", module or f"VERSION = {version!r}\n")
        f.writestr(f"{home}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        f.writestr(f"{home}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        f.writestr(f"{home}.dist-info/RECORD", "")


@pytest.fixture
def own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip and uv know nothing of how this machine configures them."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    for name in ("XDG_CONFIG_DIRS", "XDG_CONFIG_HOME", "HOME"):  # where this machine's own pip.conf may lie
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("works", [True, False])
def test_packages_come_from_the_index_that_pip_has(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    own_configuration: None,
    works: bool,
) -> None:
    """Torch for CPUs where the index has it, kept by later set-ups; one line where not; pip where uv fails."""
    index, home = tmp_path / "index", tmp_path / "venv"
    index.mkdir()
    for version in ("3.0", "3.0+cpu"):
        wheel(index, "torch", version)
    wheel(index, "nvidia_x", "2.0")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    (tmp_path / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {index}\n")
    venv.create(home)
    tools = Path(sys.executable).parent
    real = str(tools / "uv")
    broken = tmp_path / "broken-uv"
    broken.write_text(f'#!/bin/sh\ncase "$*" in *dry-run*) exec {real} "$@";; esac\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setattr(set_up, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(set_up, "uv_of", lambda lock: real if works else str(broken))
    monkeypatch.setattr(set_up, "PIP", (*set_up.PIP, "--python", str(home / "bin" / "python")))
    monkeypatch.setattr(set_up, "compile_modules", lambda: None)
    monkeypatch.setattr(set_up.sys, "executable", str(home / "bin" / "python"))

    def installed() -> list[str]:
        return sorted(p.name for p in home.glob("lib/*/site-packages/*.dist-info"))

    (tmp_path / "lock").write_text("torch==3.0\nnvidia-x==2.0\n")
    assert set_up.main(["cpu"]) == 0
    assert installed() == ["torch-3.0+cpu.dist-info"]
    assert ("pip instead" in capfd.readouterr().out) == (not works)
    if not works:
        return
    monkeypatch.setattr(set_up, "version", lambda name: "3.0+cpu")
    assert set_up.main([]) == 0
    assert installed() == ["torch-3.0+cpu.dist-info"]
    (tmp_path / "lock").write_text("torch==4.0\n")
    assert set_up.main(["cpu"]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("TORCH=cpu: your package index has no torch==4.0+cpu; name one that has with")
    monkeypatch.setattr(set_up, "version", lambda name: "3.0")
    (tmp_path / "lock").write_text("nvidia-x==2.0\n")
    assert set_up.main([]) == 0
    assert installed() == ["nvidia_x-2.0.dist-info", "torch-3.0+cpu.dist-info"]
    assert subprocess.run([home / "bin" / "python", "-c", "import torch"]).returncode == 0


@pytest.mark.slow
def test_a_wheel_without_its_library_is_replaced_by_the_one_that_pip_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_configuration: None
) -> None:
    """uv takes a version from the first index that has it (extra ones first), whatever better wheel another has."""
    home = tmp_path / "venv"
    venv.create(home)
    python = home / "bin" / "python"
    for index, tag, module in (("one", "py3-none-any", "raise OSError"), ("two", "cp311-none-any", "")):
        folder = tmp_path / index / "soundfile"
        wheel(folder, "soundfile", "0.1", tag, module)
        (folder / "index.html").write_text("".join(f'<a href="{p.name}">{p.name}</a>' for p in folder.glob("*.whl")))
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "two").as_uri())
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", (tmp_path / "one").as_uri())
    monkeypatch.setattr(set_up, "LOCK", tmp_path / "lock")
    (tmp_path / "lock").write_text("soundfile==0.1\n")
    real = str(Path(sys.executable).parent / "uv")
    monkeypatch.setattr(set_up, "uv_of", lambda lock: real)
    monkeypatch.setattr(set_up, "PIP", (*set_up.PIP, "--python", str(python)))
    monkeypatch.setattr(set_up, "compile_modules", lambda: None)
    monkeypatch.setattr(set_up.sys, "executable", str(python))
    complete = set_up.complete
    monkeypatch.setattr(set_up, "complete", lambda lock: None)
    assert set_up.main([]) == 0
    works = [str(python), "-c", "import soundfile"]
    assert subprocess.run(works, stderr=subprocess.DEVNULL).returncode == 1
    complete(["other==1", "soundfile==0.1"])
    assert subprocess.run(works).returncode == 0


def test_another_torch_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert set_up.main(["gpu"]) == 2
    assert capsys.readouterr().err == "TORCH=gpu is not known; choose TORCH=cpu or leave it out\n"
