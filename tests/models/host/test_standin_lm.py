"""Stand-ins: pretraining learns more than counts do, repeats exactly, and publishes once."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.host import standin
from models.host.cache import cached_directory
from models.host.host_lm import Corpus, load_host_lm
from models.host.standin import Recipe, ngram_cross_entropies, pretrained, train

ROOT = Path(__file__).resolve().parents[3]
# after "a" comes "b" or "c" in turn: one byte of context leaves ln 2 every other byte, two leave nothing
PATTERN = np.tile(np.frombuffer(b"abac", np.uint8), 500).astype(np.uint16)
TINY = Recipe(phases=((40, 8, 16), (5, 4, 32)), warmup=5, bigram_steps=150)


def quiet(line: str) -> None:
    pass


def test_pretraining_beats_the_bigram_it_starts_from():
    lines: list[str] = []
    _, summary = train("standin-small", PATTERN, PATTERN[:1024], TINY, lines.append)
    assert summary["heldout_bigram_ce"] == pytest.approx(math.log(2) / 2, abs=0.05)
    assert summary["heldout_ce"] < 0.15
    assert summary["tokens"] == 40 * 8 * 16 + 5 * 4 * 32
    assert "nats/byte" in lines[-1]


def test_bigram_start_reaches_the_bigram_cross_entropy():
    torch.manual_seed(0)
    model = standin.build_model("standin-small")
    tokens_N = torch.from_numpy(PATTERN.astype(np.int64))
    standin._fit_bigram(model, tokens_N, 150)
    logits_NV = model.lm_head(model.gpt_neox.final_layer_norm(model.gpt_neox.embed_in(tokens_N[:-1])))
    ce = torch.nn.functional.cross_entropy(logits_NV, tokens_N[1:]).item()
    assert math.log(2) / 2 - 1e-3 <= ce < math.log(2) / 2 + 0.02


def test_pretraining_repeats_bit_for_bit_and_leaves_the_process_as_it_was():
    recipe = Recipe(phases=((3, 2, 16),), warmup=1, bigram_steps=5)
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    first, _ = train("standin-small", PATTERN, PATTERN[:128], recipe, quiet)
    assert torch.equal(torch.rand(1), expected_draw)
    torch.manual_seed(99)
    second, _ = train("standin-small", PATTERN, PATTERN[:128], recipe, quiet)
    assert torch.get_num_threads() == threads
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_ngram_cross_entropies_have_their_closed_forms():
    uniform = torch.arange(64).repeat(200)
    unigram, bigram = ngram_cross_entropies(uniform, uniform, 64)
    assert unigram == pytest.approx(math.log(64), abs=1e-6)
    assert bigram < 0.05  # the successor is certain


def test_loaded_stand_in_is_the_cached_one_and_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setitem(standin.RECIPES, "standin-small", Recipe(phases=((2, 2, 16),), warmup=1, bigram_steps=5))
    calls = []

    def tokens() -> tuple[np.ndarray, np.ndarray]:
        calls.append(1)
        return PATTERN, PATTERN[:128]

    lm = load_host_lm("standin-small", cache_dir=tmp_path, corpus=Corpus("pattern", tokens))
    again = load_host_lm("standin-small", cache_dir=tmp_path, corpus=Corpus("pattern", tokens))
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(lm.model.parameters(), again.model.parameters(), strict=True))
    assert (lm.d_model, lm.n_layers, lm.d_vocab) == (64, 6, 257)
    other = pretrained("standin-small", "another corpus", tokens, cache_dir=tmp_path, progress=quiet)
    assert len(calls) == 2
    assert (other / "training.json").is_file()


def test_stand_in_without_corpus_says_what_to_pass(tmp_path):
    with pytest.raises(ValueError, match="pass corpus="):
        load_host_lm("standin-small", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="stand-in standin-huge is unknown"):
        pretrained("standin-huge", "x", lambda: (PATTERN, PATTERN), cache_dir=tmp_path)


def test_failed_build_leaves_nothing_that_looks_finished(tmp_path):
    def build(target: Path) -> None:
        (target / "half").write_text("x")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        cached_directory(tmp_path, "weights", build)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_two_processes_build_once(tmp_path):
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from models.host.cache import cached_directory
root = Path({str(tmp_path)!r})
def build(target):
    with open(root / "builds", "a") as f:
        f.write("x")
    time.sleep(0.5)
    (target / "weights").write_text("whole")
print((cached_directory(root, "lm", build) / "weights").read_text())
"""
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in both]
    assert outputs == ["whole", "whole"]
    assert (tmp_path / "builds").read_text() == "x"


def test_seconds_of_pretraining_are_foreseen_until_it_is_cached(tmp_path, monkeypatch):
    """Timed by a clock that only steps of training move, by a made-up price each."""
    clock = {"now": 0.0}
    fit_bigram, fit_blocks = standin._fit_bigram, standin._fit_blocks

    def bigram(model, train_N, steps):
        clock["now"] += 0.25 * steps
        fit_bigram(model, train_N, steps)

    def blocks(name, model, train_N, recipe, progress):
        clock["now"] += sum(steps * (2.0 + batch * context) for steps, batch, context in recipe.phases)
        return fit_blocks(name, model, train_N, recipe, progress)

    monkeypatch.setitem(standin.RECIPES, "standin-small", TINY)
    monkeypatch.setattr(standin, "_fit_bigram", bigram)
    monkeypatch.setattr(standin, "_fit_blocks", blocks)
    monkeypatch.setattr(standin.time, "process_time", lambda: clock["now"])
    foreseen = standin.pretraining_seconds("standin-small", "text", cache_dir=tmp_path)
    began = clock["now"]
    pretrained("standin-small", "text", lambda: (PATTERN, PATTERN[:1024]), cache_dir=tmp_path, progress=quiet)
    assert foreseen == pytest.approx(clock["now"] - began)
    assert standin.pretraining_seconds("standin-small", "text", cache_dir=tmp_path) == 0.0
