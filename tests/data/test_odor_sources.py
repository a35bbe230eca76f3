"""The downloader against a loopback HTTP server that stands for the public hosts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import molecules, odor_sources
from data._content import file_sha256
from sweeps.core.cells import UserError
from sweeps.topology.presets import PRESETS
from sweeps.topology.sources import open_table
from sweeps.topology.sweep import SWEEP

CURATED = "curated_GS_LF_merged_4983.csv"
GOODSCENTS, LEFFINGWELL = "pyrfume_goodscents_molecules.csv", "pyrfume_leffingwell_molecules.csv"
BODIES = {
    CURATED: b"nonStereoSMILES,sweet,green\nCCO,1,0\nCCCO,0,1\nCCCCO,1,1\n",
    GOODSCENTS: b"IsomericSMILES\nCCO\nC/C=C/C\nnope!\n",
    LEFFINGWELL: b"IsomericSMILES\nOCC\nCCN\n",
}


class Host:
    """Serves BODIES at /NAME; `broken` cuts every answer short, `gone` answers 404."""

    def __init__(self) -> None:
        self.bodies, self.asked, self.broken, self.gone = dict(BODIES), list[str](), False, False
        host = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                name = self.path.removeprefix("/")
                host.asked.append(name)
                if host.gone:
                    self.send_error(404)
                    return
                body = host.bodies[name]
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if host.broken else body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """The public hosts, as a server on this machine whose small files have the recorded checksums; an empty cache."""
    host = Host()
    for name, body in BODIES.items():
        original = tmp_path / name
        original.write_bytes(body)
        source = odor_sources.SOURCES[name]
        local = replace(source, url=f"{host.url}/{name}", sha256=file_sha256(original))
        monkeypatch.setitem(odor_sources.SOURCES, name, local)
        original.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_table.cache_clear()
    yield host
    open_table.cache_clear()
    host.stop()


def cached() -> list[str]:
    folder = odor_sources.cache_folder()
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_a_file_is_downloaded_once_and_read_from_the_cache_without_the_network(host: Host) -> None:
    path = odor_sources.fetch(CURATED)
    assert path.read_bytes() == BODIES[CURATED]
    assert path.parent == odor_sources.cache_folder()
    host.stop()
    assert odor_sources.fetch(CURATED) == path
    assert host.asked == [CURATED]
    assert cached() == [CURATED]


def test_the_sweep_downloads_the_tables_it_is_asked_for(host: Host) -> None:
    for table, rows in (("curated", 3), ("broader", 3), ("nonoverlap", 2)):
        cells = SWEEP.plan(replace(PRESETS["audit"], table=table, clouds=(), representations=("bits_r4",)))
        assert next(c.rows for c in cells if c.run == -1) == rows  # type: ignore[attr-defined]
    assert sorted(host.asked) == sorted(BODIES)
    assert molecules.broader().invalid["smiles"].tolist() == ["nope!"]
    assert sorted(host.asked) == sorted(BODIES)


@pytest.mark.parametrize("fault", ["offline", "gone", "broken"])
def test_failures_are_one_line_and_leave_nothing_behind(host: Host, fault: str) -> None:
    address = f"{host.url}/{CURATED}"
    if fault == "offline":
        host.stop()
    else:
        setattr(host, fault, True)
    with pytest.raises(ConnectionError) as caught:
        odor_sources.fetch(CURATED, timeout_s=5)
    text = str(caught.value)
    assert text.startswith(f"cannot download {CURATED} from {address} (")
    assert text.endswith("pass it with --set table=PATH, or --set table_path=FOLDER for several")
    assert "\n" not in text
    assert cached() == []
    with pytest.raises(UserError, match="cannot download"):
        SWEEP.plan(replace(PRESETS["audit"], table="curated"))


def test_changed_public_files_are_refused_and_not_kept(host: Host) -> None:
    host.bodies[CURATED] += b"CCCCCO,1,0\n"
    with pytest.raises(ValueError, match=r"expected .*: the public file has changed; pass the version you want"):
        odor_sources.fetch(CURATED)
    assert cached() == []


def test_a_damaged_cache_is_noticed(host: Host) -> None:
    path = odor_sources.fetch(CURATED)
    path.write_text("tampered")
    with pytest.raises(ValueError, match="delete it to download again"):
        odor_sources.fetch(CURATED)
    path.unlink()
    assert odor_sources.fetch(CURATED).read_bytes() == BODIES[CURATED]


def test_a_folder_of_files_stands_in_for_the_hosts(host: Host, tmp_path: Path) -> None:
    host.stop()
    for name, body in BODIES.items():
        (tmp_path / name).write_bytes(body)
    audit = replace(PRESETS["audit"], table_path=str(tmp_path), clouds=(), representations=("bits_r4",))
    for table in ("curated", "broader", "nonoverlap"):
        assert SWEEP.plan(replace(audit, table=table))
    assert host.asked == []


def test_sources_are_https_with_whole_checksums() -> None:
    for source in odor_sources.SOURCES.values():
        assert source.url.startswith("https://")
        assert len(bytes.fromhex(source.sha256)) == 32
    with pytest.raises(KeyError, match=r"no public source 'other\.csv'"):
        odor_sources.fetch("other.csv")
