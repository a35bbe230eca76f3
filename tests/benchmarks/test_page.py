"""The page of all speed claims says what the benchmarks' reports say, for every kind of processor."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import page
from benchmarks._paired import Paired, markdown_table
from benchmarks.page import BEGIN, END, Claim, Measured

HAND_WRITTEN = f"# Benchmarks\n\n{BEGIN}\nold\n{END}\n\nwritten by hand\n"


def _report() -> str:
    def arm(name: str, seconds: float) -> Paired:
        return Paired(name=name, baseline_s=(4.0, 4.2, 4.0), arm_s=(seconds, seconds, seconds))

    results = {"k = 32": {"peer": arm("peer", 4.0), "ours": arm("ours", 0.2), "pure": arm("pure", 1.0)}}
    return markdown_table(results, baseline="peer", targets={("k = 32", "ours"): 18.0, ("k = 32", "pure"): 9.0})


def test_claims_are_the_rows_that_have_a_target() -> None:
    found = list(page.claims(f"# a benchmark\n\n{_report()}\n\n| case | arm | peak MiB | target | met | more |"))
    assert found == [
        Claim("k = 32", "ours", "peer", "20.00 [20.00, 21.00]", "≥ 18", met=True),
        Claim("k = 32", "pure", "peer", "4.00 [4.00, 4.20]", "≥ 9", met=False),
    ]
    memory = "| case | arm | peak MiB | ratio to ours | target | met |\n|---|\n| step | peer | 39 | 15.33 | ≥ 8 | yes |"
    assert list(page.claims(f"{_report()}\n\n{memory}"))[2:] == [
        Claim("step, peak memory", "peer", "ours", "15.33", "≥ 8", met=True)
    ]


def test_the_page_has_a_column_for_each_processor_and_shows_what_was_missed(tmp_path: Path) -> None:
    (tmp_path / "benchmarks.md").write_text(HAND_WRITTEN, encoding="utf-8")
    folder = tmp_path / "benchmarks" / "measured"
    both, one = list(page.claims(_report())), list(page.claims(_report()))[:1]
    page.save(folder / "a.json", "Old CPU", [], {"sae_step": Measured("Old CPU, load 0.1", 60.0, both)})
    new = {"sae_step": Measured("New CPU, load 0.2", 30.0, one), "topology": Measured("New CPU", 1.0, failure="ended")}
    page.save(folder / "b.json", "New CPU", ["avx2", "amx_tile"], new)
    assert page.load(folder / "b.json") == new
    assert page.load(folder / "c.json") == {}
    for _ in range(2):  # writing it again changes nothing
        page.write(tmp_path)
        text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `sae_step`")]
    assert rows == [
        "| `sae_step` | k = 32: ours, against peer | ≥ 18 | 20.00 [20.00, 21.00] | 20.00 [20.00, 21.00] |",
        "| `sae_step` | k = 32: pure, against peer | ≥ 9 | **4.00 [4.00, 4.20]: missed** | not measured |",
    ]
    assert "| Old CPU (no AVX2) | New CPU (avx2, amx_tile) |" in text
    assert "- `topology`: New CPU; **ended**." in text
    assert text.startswith("# Benchmarks")
    assert text.endswith("written by hand\n")
    assert "old" not in text


def test_a_page_without_its_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "benchmarks.md").write_text("# Benchmarks\n", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks the line"):
        page.write(tmp_path)


def test_a_benchmark_that_fails_is_a_line_and_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "RUNS", {"no_such_file": ()})
    found = page.measure("no_such_file", tmp_path / "page.md", quick=True)
    assert found.claims == []
    assert "exit code 2" in found.failure


def test_every_run_names_a_benchmark_and_the_processor_has_a_name() -> None:
    assert all((page.ROOT / "benchmarks" / f"{name.split(',')[0]}.py").is_file() for name in page.RUNS)
    model, instructions = page.processor()
    assert page.kind(model, instructions)
    assert set(instructions) <= {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile"}


def test_two_generations_under_one_model_name_have_files_of_their_own() -> None:
    assert page.kind("AMD EPYC", ["avx2"]) == "amd-epyc-avx2"
    assert page.kind("AMD EPYC", ["avx2", "avx512f", "avx512_bf16"]) == "amd-epyc-avx512-bf16"
    assert page.kind("Old CPU", []) == "old-cpu"
