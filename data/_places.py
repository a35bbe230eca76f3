"""Folders and URIs that data is read from, and the libraries' errors turned into ones that name the place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

_EXPECTED = {"stream": "a directory of *.parquet shards", "text": "a file or folder of documents, or OWNER/NAME"}


class StreamUnavailable(RuntimeError):
    """The shards are unreachable from here; the message names what works instead."""


class CorruptShard(RuntimeError):
    """A shard that cannot be read, or whose rows are not token sequences; the message names it."""


def is_local(source: str) -> bool:
    """Whether a folder or URI lies on a disk of this machine."""
    filesystem, _ = filesystem_of(source)
    return isinstance(filesystem, LocalFileSystem)


def filesystem_of(source: str, endpoint: str | None = None) -> tuple[Any, str]:
    """(filesystem, path on it) of a folder or URI; the hub's endpoint is the environment's if none is given."""
    if source.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return HfFileSystem(endpoint=endpoint), source.removeprefix("hf://").rstrip("/")
    filesystem, root = fsspec.core.url_to_fs(source)
    return filesystem, root.rstrip("/")


class TextColumnMissing(ValueError):
    """A file of a text data set without the column that holds its documents."""


@contextmanager
def named_errors(source: str, shard: str | None = None, what: str = "stream") -> Iterator[None]:
    """Turn the libraries' errors into StreamUnavailable or CorruptShard that name the place."""
    remedy = "stream_path" if what == "stream" else what
    try:
        yield
    except (CorruptShard, StreamUnavailable, TextColumnMissing):
        raise
    except Exception as error:
        if source.startswith("hf://") and _is_network(error):
            raise StreamUnavailable(
                f"cannot reach {source} on the Hugging Face hub ({type(error).__name__}); "
                f"pass {remedy}=DIR with a local copy, or use --preset local, which needs no network"
            ) from error
        if shard is None and isinstance(error, FileNotFoundError):
            raise ValueError(f"{what} {source} does not exist; give {_EXPECTED[what]}") from error
        if shard is not None and isinstance(error, OSError | pa.ArrowException | ValueError | EOFError):
            reason = str(error).split("\n")[0][:200] if str(error) else type(error).__name__
            raise CorruptShard(
                f"{'shard' if what == 'stream' else 'file'} {shard} of {source} cannot be read: {reason}"
            ) from error
        raise


def _is_network(error: BaseException | None) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, HfHubHTTPError | ConnectionError | TimeoutError):
            return True
        if any(c.__module__.startswith("httpx") for c in type(error).__mro__):  # httpx before huggingface_hub 2, httpx2
            return True
        error = error.__cause__ or error.__context__
    return False
