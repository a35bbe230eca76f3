"""All speed claims on one page, docs/benchmarks.md, with a column for each kind of processor.

    python benchmarks/page.py                           # every benchmark at full size, one after another (`make bench`)
    python benchmarks/page.py --only sae_step topology  # these again; the others stay as they were measured
    python benchmarks/page.py --write                   # the page alone, from what was measured before

What a machine measured is kept in docs/benchmarks/measured/<processor>.json, one file per kind of processor, and each
benchmark's own page in docs/benchmarks/<processor>/. The machine should be idle: its load is written down.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from analysis.markdown import table
from benchmarks._paired import cpuinfo, machine

RUNS: Mapping[str, Sequence[str]] = {
    "sae_step": (),
    "sae_step, BatchTopK": ("--kind", "batchtopk", "--ks", "32"),
    "sae_step, Matryoshka": ("--kind", "matryoshka", "--ks", "32"),
    "sae_grid": (),
    "evaluation": (),
    "released_saes": (),
    "lm_trunk": (),
    "topology": (),
    "sequence_ops": (),
    "codec_lm": (),
}
"""Name on the page → options of the benchmark that its first word names: those with targets for ratios."""
DOCS = ROOT / "docs"
BEGIN, END = "<!-- measured: written by benchmarks/page.py -->", "<!-- end of what is measured -->"
_HEAD = re.compile(
    r"\| case \| arm \| (?P<what>CPU-seconds|peak MiB).* "
    r"\| ratio to (?P<peer>.*?)(?: \(median \[min, max\]\))? \| target"
)
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")


@dataclass(frozen=True)
class Claim:
    """A ratio of CPU-seconds (or of memory) that has a target: `ratio` as printed, with its range over the rounds."""

    case: str
    arm: str
    peer: str
    ratio: str
    target: str
    met: bool


@dataclass(frozen=True)
class Measured:
    """What one benchmark found on a machine. failure: why there is nothing, where it failed."""

    machine: str
    seconds: float
    claims: list[Claim] = field(default_factory=list)
    failure: str = ""


def claims(report: str) -> Iterator[Claim]:
    """The rows with a target of the tables in a benchmark's report: `_paired.markdown_table`, and of peak memory."""
    peer, of = "", ""
    for line in report.splitlines():
        if head := _HEAD.match(line):
            peer, of = head["peer"], ", peak memory" if head["what"] == "peak MiB" else ""
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 6 and cells[4].startswith("≥"):
            case, arm, _, ratio, target, met = cells
            yield Claim(case + of, arm, peer, ratio, target, met == "yes")


def processor() -> tuple[str, list[str]]:
    """(model, instruction sets that decide between our kernels) of this machine."""
    known = cpuinfo()
    flags = known.get("flags", "").split()
    return known["model name"], [name for name in _INSTRUCTIONS if name in flags]


def slug(*words: str) -> str:
    """Words as the name of a file or folder."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def kind(model: str, instructions: Sequence[str]) -> str:
    """Name of a kind of processor as a file's. Its newest instructions are in it: one model name serves generations."""
    return slug(model, *instructions[-1:])


def measure(name: str, page: Path, quick: bool) -> Measured:
    """Run one benchmark in a process of its own; its page is written to `page`."""
    began = time.monotonic()
    argv = [sys.executable, str(ROOT / "benchmarks" / f"{name.split(',', maxsplit=1)[0]}.py"), *RUNS[name]]
    argv += ["--out", str(page), *(["--quick"] if quick else [])]
    page.unlink(missing_ok=True)
    code = subprocess.run(argv, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
    taken = time.monotonic() - began
    if not page.exists():  # a missed target has an exit code of its own, but a page
        return Measured(machine(), taken, failure=f"ended with exit code {code} and wrote nothing")
    return Measured(machine(), taken, list(claims(page.read_text(encoding="utf-8"))))


def load(file: Path) -> dict[str, Measured]:
    """What was measured on one kind of processor before."""
    if not file.exists():
        return {}
    entries = json.loads(file.read_text(encoding="utf-8"))["measured"]
    return {name: Measured(**{**e, "claims": [Claim(**c) for c in e["claims"]]}) for name, e in entries.items()}


def save(file: Path, model: str, instructions: Sequence[str], measured: Mapping[str, Measured]) -> None:
    """Keep what a machine measured, a file per kind of processor."""
    entries = {name: asdict(found) for name, found in measured.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"processor": model, "instructions": list(instructions), "measured": entries}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def section(files: Sequence[Path]) -> str:
    """The table of all claims, a column for each kind of processor, and what each was measured on."""
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    names = [f"{c['processor']} ({', '.join(c['instructions']) or 'no AVX2'})" for c in contents]
    found = [load(file) for file in files]
    rows = []
    for name in RUNS:
        keys = dict.fromkeys((c.case, c.arm, c.peer, c.target) for m in found if name in m for c in m[name].claims)
        for key in keys:
            case, arm, peer, target = key
            cells = [_cell(m.get(name), key) for m in found]
            rows.append([f"`{name}`", f"{case}: {arm}, against {peer}", target, *cells])
    lines = [table(["benchmark", "claim", "target", *names], rows), ""]
    for title, m in zip(names, found, strict=True):
        lines += [f"{title}:", ""]
        for name, one in m.items():
            what = f"**{one.failure}**" if one.failure else f"{one.seconds / 60:.0f} min"
            lines.append(f"- `{name}`: {one.machine}; {what}.")
        lines.append("")
    return "\n".join(lines)


def _cell(measured: Measured | None, key: tuple[str, str, str, str]) -> str:
    for claim in measured.claims if measured else ():
        if (claim.case, claim.arm, claim.peer, claim.target) == key:
            return claim.ratio if claim.met else f"**{claim.ratio}: missed**"
    return "not measured"


def write(docs: Path) -> None:
    """Put the table between the marks of docs/benchmarks.md. Raises ValueError where the marks are missing."""
    page = docs / "benchmarks.md"
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} lacks the line {BEGIN} or {END}; put both where the table belongs")
    before, rest = text.split(BEGIN)
    files = sorted((docs / "benchmarks" / "measured").glob("*.json"))
    page.write_text(f"{before}{BEGIN}\n\n{section(files)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs; what it finds has no targets")
    parser.add_argument("--write", action="store_true", help="the page alone, from what was measured before")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages")
    args = parser.parse_args()
    model, instructions = processor()
    folder = args.docs / "benchmarks"
    file = folder / "measured" / f"{kind(model, instructions)}.json"
    for i, name in enumerate(() if args.write else args.only, start=1):
        print(f"benchmark {i} of {len(args.only)}: {name}", file=sys.stderr, flush=True)
        page = folder / kind(model, instructions) / f"{slug(name)}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        found = measure(name, page, args.quick)
        # what is finished stays when the next one is stopped
        save(file, model, instructions, load(file) | {name: found})
        write(args.docs)
    if args.write:
        write(args.docs)


if __name__ == "__main__":
    main()
