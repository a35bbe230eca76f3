"""A loopback HTTP server that plays the Hugging Face hub's file endpoints for one dataset and one model."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPO = "NeelNanda/pile-small-tokenized-2b"
MODEL = "EleutherAI/pythia-70m"


class HubServer:
    """Serves ``folder`` as the dataset's ``data/``; records the requests, and the bytes sent of each file.

    ``move_on`` makes another folder the dataset's ``main``, under a commit of its own, and may do so for the model.
    """

    def __init__(self, folder: Path, model: Path | None = None) -> None:
        self.head = "a" * 40
        self.commits = {self.head: folder}
        self.models = {self.head: model}
        self.requests: list[tuple[str, str, str | None]] = []
        self.bytes_sent: dict[str, int] = {}
        self.refusing = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def move_on(self, commit: str, folder: Path, model: Path | None = None) -> None:
        self.head, self.commits[commit], self.models[commit] = commit, folder, model

    def entries(self, revision: str = "main") -> list[dict]:
        folder = self.commits[self.commit(revision)]
        return [
            {"type": "file", "oid": f"{i:040x}", "size": path.stat().st_size, "path": f"data/{path.name}"}
            for i, path in enumerate(sorted(folder.glob("*.parquet")))
        ]

    def commit(self, revision: str) -> str:
        return self.head if revision == "main" else revision

    def _handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.requests.append(("POST", self.path, None))
                paths = json.loads(body)["paths"] if body.startswith(b"{") else []
                folder = {"type": "directory", "oid": "f" * 40, "size": 0, "path": "data"}
                entries = hub.entries(self.path.rsplit("/", 1)[-1])
                self.reply_json([e for e in [folder, *entries] if e["path"] in paths])

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path, self.headers.get("Range")))
                api, resolve = f"/api/datasets/{REPO}", f"/datasets/{REPO}/resolve/"
                if hub.refusing:
                    self.reply(403, b"{}", {})
                elif path.startswith(f"{api}/tree/"):
                    self.reply_json(hub.entries(path.removeprefix(f"{api}/tree/").split("/")[0]))
                elif path == api or path.startswith(f"{api}/revision/"):
                    revision = path.removeprefix(api).removeprefix("/revision/") or "main"
                    self.reply_json({"_id": "1", "id": REPO, "sha": hub.commit(revision), "siblings": []})
                elif path.startswith(resolve):
                    revision, _, name = path.removeprefix(resolve).partition("/data/")
                    self.reply_file(hub.commit(revision), hub.commits.get(hub.commit(revision)), name)
                elif path.startswith(f"/{MODEL}/resolve/"):
                    revision, _, name = path.removeprefix(f"/{MODEL}/resolve/").partition("/")
                    self.reply_file(hub.commit(revision), hub.models.get(hub.commit(revision)), name)
                else:
                    self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})

            def reply_file(self, commit: str, folder: Path | None, name: str) -> None:
                if folder is None or not (folder / name).is_file():
                    self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                    return
                file = folder / name
                data = file.read_bytes()
                tag = hashlib.sha256(data).hexdigest()
                headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
                wanted = self.headers.get("Range")
                if wanted is None:
                    self.reply(200, data, headers, of=file.name)
                    return
                first, last = wanted.removeprefix("bytes=").split("-")
                stop = min(int(last) + 1 if last else len(data), len(data))
                headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
                self.reply(206, data[int(first) : stop], headers, of=file.name)

            def reply_json(self, value: object) -> None:
                self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

            def reply(self, status: int, body: bytes, headers: dict[str, str], of: str | None = None) -> None:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)
                    if of is not None:
                        hub.bytes_sent[of] = hub.bytes_sent.get(of, 0) + len(body)

        return Handler
