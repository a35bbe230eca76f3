"""report.html: a report as one file, made from report.md, with its figures inside and tables that sort by a click.

What a ledger holds (names, reasons, notes) reaches a report as Markdown. Here raw HTML is text, links lead to http(s)
or to files of the report alone, images are files of the report alone, and the page's policy lets no other script run
than the page's own, so that a hostile name is shown and does nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import mimetypes
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

REPORT, PAGE = "report.md", "report.html"
_PICTURES = (".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp")
_WEB = re.compile(r"https?://", re.IGNORECASE)

_STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --soft: #60646c; --line: #d9dce1; --back: #fff; --band: #f4f5f7;
  --link: #0b62a8 }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6ea; --soft: #a0a6b0; --line: #3a3f47; --back: #16181c;
  --band: #1f2227; --link: #7ab8f5 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25 }
h2 { font-size: 1.2rem; margin-top: 2.2rem; padding-top: .6rem; border-top: 1px solid var(--line) }
a { color: var(--link) }
img { display: block; max-width: 100%; height: auto; margin: 1rem 0; background: #fff; border-radius: 4px }
.caption { display: block; margin: -.6rem 0 1rem; font-size: .85rem; color: var(--soft) }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace }
.table { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
tbody tr:nth-child(even) { background: var(--band) }
th { cursor: pointer; white-space: nowrap; color: var(--soft); font-weight: 600 }
th[aria-sort]::after { content: " \\2191" }
th[aria-sort=descending]::after { content: " \\2193" }
@media print { body { max-width: none } .table { overflow: visible } }
"""

# numbers first, by the number that a cell begins with; then texts; cells without a value last, whichever way
_SCRIPT = """
const unit = { k: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15 };
function value(cell) {
  const text = cell.textContent.trim();
  if (text === "" || text === "\\u2013") return [2, 0];
  const found = text.replace(/\\u2212/g, "-")
    .match(/^[^\\d+.-]?\\s*([+-]?[\\d,]*\\.?\\d+(?:[eE][+-]?\\d+)?)([kMGTP]?)(?=$|[\\s[(*%;,])/);
  if (!found) return [1, text];
  return [0, parseFloat(found[1].replace(/,/g, "")) * (unit[found[2]] || 1)];
}
function sort(head) {
  const table = head.closest("table"), body = table.tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
  const rows = [...body.rows].map(row => [value(row.cells[head.cellIndex]), row]);
  rows.sort(([[a, x]], [[b, y]]) => a !== b ? (Math.max(a, b) === 2 ? a - b : sign * (a - b))
    : a === 1 ? sign * x.localeCompare(y) : a === 0 ? sign * (x - y) : 0);
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...rows.map(([, row]) => row));
}
for (const head of document.querySelectorAll("th")) {
  head.tabIndex = 0;
  head.title = "sort";
  head.addEventListener("click", () => sort(head));
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(head); });
}
"""


def write_page(folder: Path) -> Path | None:
    """Write report.html next to the report.md of a folder, from that file and its figures.

    Returns its path; None where the folder holds no report.md.
    """
    source = folder / REPORT
    if not source.is_file():
        return None
    page = folder / PAGE
    page.write_text(page_of(source.read_text(encoding="utf-8"), folder), encoding="utf-8")
    return page


class _Renderer(RendererHTML):
    """Markdown's own but for figures, links and tables; `env["folder"]` is the report's folder."""

    def image(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        text = self.renderInlineAsText(tokens[idx].children or [], options, env)
        picture = _embedded(env["folder"], str(tokens[idx].attrGet("src") or ""))
        if not picture:
            return f"[{html.escape(text)}]"
        caption = f'<span class="caption">{html.escape(text)}</span>' if " " in text else ""
        return f'<img src="{picture}" alt="{html.escape(text, quote=True)}">{caption}'

    def link_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        target = str(tokens[idx].attrGet("href") or "")
        if _WEB.match(target) or _file_of(env["folder"], target) is not None:
            tokens[idx].attrSet("rel", "noreferrer")
        else:
            tokens[idx].attrs.pop("href", None)
        return self.renderToken(tokens, idx, options, env)

    def table_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return '<div class="table"><table>\n'

    def table_close(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return "</table></div>\n"


def page_of(markdown: str, folder: Path) -> str:
    """The page of a report's Markdown, whose figures lie in `folder`."""
    parser = MarkdownIt("commonmark", {"html": False}, renderer_cls=_Renderer).enable("table")
    body = parser.render(markdown, {"folder": folder})
    title = next((line[2:] for line in markdown.splitlines() if line.startswith("# ")), "Report")
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _file_of(folder: Path, name: str) -> Path | None:
    """The file of the report's folder that a link names; None for anything else."""
    name = unquote(name)
    if not name or "/" in name or "\\" in name or name in (".", ".."):
        return None
    file = folder / name
    return file if file.is_file() and not file.is_symlink() else None


def _embedded(folder: Path, name: str) -> str:
    """A figure as a data address; empty where it is not a figure of the report."""
    file = _file_of(folder, name)
    if file is None or file.suffix.lower() not in _PICTURES:
        return ""
    kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
