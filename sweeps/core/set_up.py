"""`make venv`: the packages of requirements.lock by uv, as pip is configured here, and by pip where uv fails.

Runs in a virtual environment that holds nothing but pip yet: only the standard library is imported.
"""

from __future__ import annotations

import ast
import compileall
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LOCK = Path(__file__).resolve().parents[2] / "requirements.lock"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
ENVIRONMENT = {  # pip's option: uv's variable (and not an argument, which every user of the machine could read)
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
}
ON_CPUS = ("torch", "torchaudio")  # the packages that are built for CPUs alone, under a version of their own
FOR_GPUS = ("nvidia-", "cuda-")  # the beginnings of the names of what those builds do without
WITH_LIBRARY = ("soundfile",)  # packages that have a wheel with their C library, and one without it

RARE = r"/(tests?|testing|transformers/models|plotly|statsmodels|rllib|wandb|Cython|IPython)/"  # folders, half of all


def pips_options(listing: str) -> dict[str, str]:
    """What `pip install` would use, by option, from the lines of `pip config list`; later sources overrule earlier."""
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in found:
            found[section][option] = str(ast.literal_eval(value))
    return {option: value for options in found.values() for option, value in options.items()}


def uvs_environment(options: Mapping[str, str]) -> dict[str, str]:
    """uv's variables for these options of pip; several values become one line, as uv expects them.

    Like pip, uv then looks for a version in all of the indexes, not only in the first that knows the package.
    """
    out = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for option, variable in ENVIRONMENT.items():
        if values := options.get(option, "").split():
            out[variable] = ("," if option == "find-links" else " ").join(values)
    if options.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        out["UV_NO_INDEX"] = "1"
    return out


def for_cpus(lock: Sequence[str]) -> list[str]:
    """The lines of a lock with torch's builds for CPUs, and without the libraries for GPUs."""
    out = []
    for line in lock:
        pin, mark, condition = line.partition(";")
        name = pin.partition("==")[0].strip()
        if not name.startswith(FOR_GPUS):
            out.append(f"{pin.strip()}+cpu{' ' + mark if mark else ''}{condition}" if name in ON_CPUS else line)
    return out


def install(uv: str, requirements: Path, *more: str) -> bool:
    """Install the file's packages by uv, or by pip where there is no uv or it fails. Returns whether that worked."""
    asked = ("install", "--quiet", "--no-deps", "-r", str(requirements), *more)
    if uv:
        listing = subprocess.run([*PIP, "config", "list"], capture_output=True, encoding="utf-8").stdout
        env = uvs_environment(pips_options(listing)) | os.environ
        if subprocess.run([uv, "pip", *asked, "--python", sys.executable], env=env).returncode == 0:
            return True
        if more:
            return False
        print("uv failed; pip instead, which takes several minutes", flush=True)
    return subprocess.run([*PIP, *asked]).returncode == 0


def complete(lock: Sequence[str]) -> None:
    """Install again by pip what lacks its C library: of a version that two indexes have, uv takes the first's wheel."""
    for pin in [line for line in lock if line.startswith(tuple(f"{name}==" for name in WITH_LIBRARY))]:
        name = pin.partition("==")[0]
        if subprocess.run([sys.executable, "-c", f"import {name}"], stderr=subprocess.DEVNULL).returncode:
            subprocess.run([*PIP, "install", "--quiet", "--no-deps", "--force-reinstall", pin])


def uv_of(lock: Sequence[str]) -> str:
    """uv's program, installed by pip in the lock's version; empty where that fails."""
    (pin,) = [line for line in lock if line.startswith("uv==")]
    program = Path(sys.executable).parent / "uv"
    done = subprocess.run([*PIP, "install", "--quiet", "--no-deps", pin])
    return str(program) if done.returncode == 0 and program.exists() else ""


def compile_modules() -> None:
    """Compile what is imported often, where Python is told to keep no bytecode: each process would compile it again.

    Elsewhere (and after pip, which compiles everything) this would take longer than the first import does.
    """
    if sys.dont_write_bytecode:
        compileall.compile_dir(sysconfig.get_path("purelib"), quiet=2, workers=0, rx=re.compile(RARE))


def has_cpu_torch() -> bool:
    """Whether the environment was made with torch's builds for CPUs: it keeps them."""
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def main(arguments: Sequence[str]) -> int:
    """Arguments: nothing, or `cpu`. Returns the exit code."""
    if list(arguments) not in ([], ["cpu"]):
        print(f"TORCH={' '.join(arguments)} is not known; choose TORCH=cpu or leave it out", file=sys.stderr)
        return 2
    lock = LOCK.read_text(encoding="utf-8").splitlines()
    uv = uv_of(lock)
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder, "requirements.txt")
        if arguments or has_cpu_torch():
            lock = for_cpus(lock)
            pins = [line for line in lock if "+cpu" in line]
            chosen.write_text("\n".join(pins), encoding="utf-8")
            if not install(uv, chosen, "--dry-run"):
                line = f"TORCH=cpu: your package index has no {' or no '.join(pins)}; name one that has with "
                print(f"{line}`pip config set global.extra-index-url ADDRESS`, or leave TORCH out", file=sys.stderr)
                return 2
        chosen.write_text("\n".join(lock), encoding="utf-8")
        if not install(uv, chosen):
            return 1
    complete(lock)
    compile_modules()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
