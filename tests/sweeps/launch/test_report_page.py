"""report.html: one file with its figures, whatever a ledger's names are; tables sort by a click."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis.markdown import table
from sweeps.launch.report_page import page_of, write_page

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</td></table><svg/onload=alert(1)>",
    "[click](javascript:alert(1))",
    "[click](data:text/html;base64,PHNjcmlwdD4=)",
    "[click](../../../etc/passwd)",
    "![seen](http://127.0.0.1:9/track.png)",
    "![seen](/etc/passwd)",
    "a | b",
    '" onclick="alert(1)',
    "&lt;script&gt;alert(1)&lt;/script&gt;",
]


class Tags(HTMLParser):
    """Every tag with its attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == name]


def test_a_hostile_name_becomes_neither_html_nor_script(tmp_path: Path) -> None:
    text = f"# Report of {HOSTILE[0]}\n\n{table(['name'], [[name] for name in HOSTILE])}\n\n" + "\n\n".join(HOSTILE)
    page = Tags(page_of(text, tmp_path))
    assert [tag for tag, _ in page.tags if tag in ("svg", "iframe", "object", "img", "form")] == []
    assert len(page.all("script")) == 1
    assert not [attrs for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert [a for a in page.all("a") if a.get("href")] == []
    assert "<script>alert(1)</script>" in page.text  # shown, as text
    assert len(page.all("table")) == 1
    assert len(page.all("tr")) == 1 + len(HOSTILE)
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'$", policy)


def test_one_file_with_its_figures_and_links_to_files_of_the_report_alone(tmp_path: Path) -> None:
    (tmp_path / "r2 vs ce.png").write_bytes(PNG)
    (tmp_path / "sample.wav").write_bytes(b"RIFF")
    (tmp_path / "report.md").write_text(
        "# Title\n\n![R² against CE_rec](<r2 vs ce.png>)\n\n![not there](gone.png)\n\n[heard](sample.wav) "
        "[paper](https://example.org/a)\n",
        encoding="utf-8",
    )
    made = write_page(tmp_path)
    assert made is not None
    text = made.read_text(encoding="utf-8")
    page = Tags(text)
    (image,) = page.all("img")
    assert (image["src"] or "").startswith("data:image/png;base64,iVBORw0KGgo")
    assert image["alt"] == "R² against CE_rec"
    assert "[not there]" in page.text
    assert [a["href"] for a in page.all("a")] == ["sample.wav", "https://example.org/a"]
    assert page.all("link") == []
    assert not [a for _, a in page.tags if (a.get("src") or "data:")[:5] != "data:"]
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "<title>Title</title>" in text
    (tmp_path / "report.md").unlink()
    assert write_page(tmp_path) is None


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_a_click_sorts_by_number_and_leaves_empty_cells_last(tmp_path: Path) -> None:
    """The page's own script in a real browser; a second script clicks, which the page's policy would refuse."""
    values = ["0.5 [0.1, 0.9]", "−3.2", "12k", "–", "1,300", "+0.25", ""]
    page = page_of(f"# T\n\n{table(['v'], [[value] for value in values])}\n", tmp_path)
    free = re.sub(r"<meta http-equiv[^>]*>", "", page)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    click = "<script>const h = document.querySelector('th'); h.click(); {}</script>"
    for times, expected in (
        (1, ["−3.2", "+0.25", "0.5 [0.1, 0.9]", "1,300", "12k", "–", ""]),
        (2, ["12k", "1,300", "0.5 [0.1, 0.9]", "+0.25", "−3.2", "–", ""]),
    ):
        file = tmp_path / "page.html"
        file.write_text(free.replace("</body>", click.format("h.click();" * (times - 1)) + "</body>"), encoding="utf-8")
        run = subprocess.run(
            [CHROMIUM, *options, "--dump-dom", file.as_uri()],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
            check=True,
        )
        assert re.findall(r"<td[^>]*>(.*?)</td>", run.stdout) == expected
