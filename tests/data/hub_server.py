"""A loopback HTTP server that plays the Hugging Face hub's file endpoints for one dataset."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPO = "NeelNanda/pile-small-tokenized-2b"


class HubServer:
    """Serves ``folder`` as the dataset's ``data/``; remembers requests and bytes sent of each file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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

    def entries(self) -> list[dict]:
        return [
            {"type": "file", "oid": f"{i:040x}", "size": path.stat().st_size, "path": f"data/{path.name}"}
            for i, path in enumerate(sorted(self.folder.glob("*.parquet")))
        ]

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
                self.reply_json([e for e in [folder, *hub.entries()] if e["path"] in paths])

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path, self.headers.get("Range")))
                api, resolve = f"/api/datasets/{REPO}", f"/datasets/{REPO}/resolve/main/data/"
                if hub.refusing:
                    self.reply(403, b"{}", {})
                elif path.startswith(f"{api}/tree/main"):
                    self.reply_json(hub.entries())
                elif path in (api, f"{api}/revision/main"):
                    self.reply_json({"_id": "1", "id": REPO, "sha": "a" * 40, "siblings": []})
                elif path.startswith(resolve) and (hub.folder / path.removeprefix(resolve)).is_file():
                    self.reply_file(hub.folder / path.removeprefix(resolve))
                else:
                    self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})

            def reply_file(self, file: Path) -> None:
                data = file.read_bytes()
                headers = {"ETag": f'"{file.name}"', "X-Repo-Commit": "a" * 40, "Accept-Ranges": "bytes"}
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
