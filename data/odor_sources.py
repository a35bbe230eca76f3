"""Public odor tables: where they live, their checksums, and a cache for them.

The tables are not part of this repository. OpenPOM (github.com/BioMachineLearning/openpom, MIT) publishes the
curated GoodScents/Leffingwell table; pyrfume-data (github.com/pyrfume/pyrfume-data) the two molecule lists.
"""

from __future__ import annotations

import http.client
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from data._content import file_sha256


@dataclass(frozen=True, kw_only=True)
class Source:
    """One downloadable file: `url`, the `sha256` of the bytes the studies were run on, and the cached `name`."""

    name: str
    url: str
    sha256: str


_OPENPOM = "https://raw.githubusercontent.com/BioMachineLearning/openpom/main/openpom/data/curated_datasets"
_PYRFUME = "https://raw.githubusercontent.com/pyrfume/pyrfume-data"

SOURCES = {
    source.name: source
    for source in (
        Source(
            name="curated_GS_LF_merged_4983.csv",
            url=f"{_OPENPOM}/curated_GS_LF_merged_4983.csv",
            sha256="0c18b6e9f0f99b772203ba4da30a96b3d60db700349376cbafe23512a9baa704",
        ),
        Source(
            name="pyrfume_goodscents_molecules.csv",
            url=f"{_PYRFUME}/84845e5f62c80671827225cebb3e9eec1cdb4747/goodscents/molecules.csv",
            sha256="0d9bd38c54a40a051ae7b771d51f11ac1fcf021e0369fc53583e5f634e6e8bb4",
        ),
        Source(
            name="pyrfume_leffingwell_molecules.csv",
            url=f"{_PYRFUME}/main/leffingwell/molecules.csv",
            sha256="a06841a275c35b9db9253a24ac913ad97bf39f2c778e4f8a5c4df641e7dc0fa6",
        ),
    )
}


def cache_folder() -> Path:
    """`$PLUMBLINE_CACHE/odor`, else `$XDG_CACHE_HOME/plumbline/odor`, else `~/.cache/plumbline/odor`."""
    if named := os.environ.get("PLUMBLINE_CACHE"):
        return Path(named) / "odor"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plumbline" / "odor"


def fetch(name: str, folder: Path | None = None, timeout_s: float = 30.0) -> Path:
    """Path of the checked, cached copy of SOURCES[name]; downloads it when the cache has none.

    Raises:
        KeyError: the name is not in SOURCES.
        ConnectionError: the file is not cached and its host cannot be reached (names `--set table=PATH`).
        ValueError: the bytes do not have the recorded checksum, cached or downloaded.
    """
    if name not in SOURCES:
        raise KeyError(f"no public source {name!r}; choose one of {sorted(SOURCES)}")
    source = SOURCES[name]
    path = (folder or cache_folder()) / name
    if not path.exists():
        _download(source, path, timeout_s)
    found = file_sha256(path)
    if found != source.sha256:
        raise ValueError(
            f"{path} has sha256 {found[:12]}…, expected {source.sha256[:12]}…; delete it to download again, "
            f"or pass a file you trust with --set table=PATH"
        )
    return path


def _download(source: Source, path: Path, timeout_s: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with urllib.request.urlopen(source.url, timeout=timeout_s) as reply:
            partial.write_bytes(reply.read())
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        partial.unlink(missing_ok=True)
        raise ConnectionError(
            f"cannot download {source.name} from {source.url} ({error}); "
            f"get the file yourself and pass it with --set table=PATH, or --set table_path=FOLDER for several"
        ) from error
    found = file_sha256(partial)
    if found != source.sha256:
        partial.unlink()
        raise ValueError(
            f"{source.url} has sha256 {found[:12]}…, expected {source.sha256[:12]}…: the public file has changed; "
            f"pass the version you want with --set table=PATH"
        )
    partial.replace(path)
