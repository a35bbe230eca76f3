"""A model of an object store for fsspec: keys in one flat order, no folders, and every request counted.

Registered as `model://bucket/...`. A listing returns at most 1,000 keys and common prefixes per page, as S3 and GCS do;
a check for a missing key costs a HEAD and, as s3fs does it, a LIST. Nothing is cached between requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from datetime import UTC, datetime
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem

PAGE = 1000


class ModelStore(AbstractFileSystem):
    """All instances of a process share one store; `requests` counts LIST, GET, HEAD, PUT and DELETE."""

    protocol = "model"
    cachable = False
    objects: ClassVar[dict[str, bytes]] = {}
    written: ClassVar[dict[str, datetime]] = {}
    requests: ClassVar[Counter[str]] = Counter()
    _order: ClassVar[list[str]] = []
    _dirty: ClassVar[bool] = False

    @classmethod
    def clear(cls) -> None:
        """Empty the store and the counts."""
        cls.objects.clear()
        cls.written.clear()
        cls.requests.clear()
        cls._dirty = True

    @classmethod
    def _sorted(cls) -> list[str]:
        if cls._dirty:
            ModelStore._order, ModelStore._dirty = sorted(cls.objects), False
        return cls._order

    def _list(self, prefix: str, delimiter: str) -> list[tuple[str, bool]]:
        """[(key or common prefix, whether it is a prefix)] below a prefix."""
        order, out = self._sorted(), []
        i = bisect_left(order, prefix)
        while i < len(order) and order[i].startswith(prefix):
            head, cut, _ = order[i][len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if cut:
                out.append((f"{prefix}{head}", True))
                i = bisect_left(order, f"{prefix}{head}/\U0010ffff", lo=i)
            else:
                out.append((order[i], False))
                i += 1
        self.requests["LIST"] += max(1, -(-len(out) // PAGE))
        return out

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        found = self._list(f"{self._strip_protocol(path)}/", "/")
        if not found:
            raise FileNotFoundError(path)
        return [self._info(name, is_prefix) if detail else name for name, is_prefix in found]

    def find(self, path: str, maxdepth: Any = None, withdirs: bool = False, detail: bool = False, **kwargs: Any) -> Any:
        found = [name for name, _ in self._list(f"{self._strip_protocol(path)}/", "")]
        return {name: self._info(name, False) for name in found} if detail else found

    def _info(self, name: str, is_prefix: bool) -> dict[str, Any]:
        kind, size = ("directory", 0) if is_prefix else ("file", len(self.objects[name]))
        return {"name": name, "size": size, "type": kind}

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        self.requests["HEAD"] += 1
        if path in self.objects:
            return self._info(path, False)
        if self._list(f"{path}/", "/"):
            return self._info(path, True)
        raise FileNotFoundError(path)

    def modified(self, path: str) -> datetime:
        """When the object was written; one HEAD."""
        self.info(path)
        return self.written[self._strip_protocol(path)]

    def exists(self, path: str, **kwargs: Any) -> bool:
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        self.requests["GET"] += 1
        try:
            return self.objects[self._strip_protocol(path)][start:end]
        except KeyError:
            raise FileNotFoundError(path) from None

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self.requests["PUT"] += 1
        path = self._strip_protocol(path)
        if mode == "create" and path in self.objects:
            raise FileExistsError(path)
        ModelStore._dirty |= path not in self.objects
        self.objects[path] = bytes(value)
        self.written[path] = datetime.now(UTC)

    def rm_file(self, path: str) -> None:
        self.requests["DELETE"] += 1
        ModelStore._dirty |= self.objects.pop(self._strip_protocol(path), None) is not None


fsspec.register_implementation("model", ModelStore, clobber=True)
