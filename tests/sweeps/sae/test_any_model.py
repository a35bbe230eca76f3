"""The proxy gap on a model and a text that are in no table: cells, fingerprints, streams, faults before any pack."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from sweeps.core.cells import UserError
from sweeps.core.settings import RunSettings
from sweeps.launch.command import main
from sweeps.sae import origin, sources
from sweeps.sae.cells import Grid, SAECell
from sweeps.sae.presets import PRESETS
from sweeps.sae.sweep import SWEEP
from sweeps.sae.tokenise import main as tokenise

WORDS = [f"w{i}" for i in range(60)]


def save(folder: Path, kind: str = "qwen2", *, tokenizer: bool = True) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 6, "vocab_size": 64}
    if kind == "mamba":
        config: Any = transformers.MambaConfig(**sizes, state_size=4)
    else:
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
        config = transformers.AutoConfig.for_model(kind, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if tokenizer:
        made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<|endoftext|>", *WORDS])}, "<|endoftext|>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.save(str(folder / "tokenizer.json"))
    return folder


def save_text(file: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(rng.choice(WORDS, 50)), "n": str(i)}) for i in range(600)]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for cached in (origin._lm_origin, origin._stream_origin, origin._text_identity):
        cached.cache_clear()


def grid(folder: Path, **changes: Any) -> Grid:
    base = replace(PRESETS["local"], models=(str(folder),), k=(2,), seeds=(0,), tokens=(2048, 4096), context=16)
    return replace(base, **{"batch_tokens": 256, "shuffle_sequences": 16, "eval_sequences": 8} | changes)


def cells(folder: Path, **changes: Any) -> list[SAECell]:
    return list(SWEEP.plan(grid(folder, **changes)))


def test_depths_and_hooks_of_any_model(tmp_path: Path) -> None:
    folder = save(tmp_path / "lm")
    planned = cells(folder)
    assert [(c.depth, c.layer) for c in planned[::2]] == [("early", 1), ("mid", 3), ("late", 5)]
    assert "hook" not in planned[0].identity()
    other = cells(folder, hook="mlp_out")
    assert other[0].identity()["hook"] == "mlp_out"
    assert {c.key for c in planned}.isdisjoint(c.key for c in other)
    assert planned[0].trajectory() == planned[1].trajectory() != other[0].trajectory()
    with pytest.raises(UserError, match=r"layer=6 is out of range for .*; choose 0 to 5"):
        cells(folder, layers=(6,))
    with pytest.raises(UserError, match=r"hook='middle' is not known; choose one of resid_post, resid_pre, mlp_out"):
        cells(folder, hook="middle")


def test_a_fingerprint_is_of_content_not_of_place(tmp_path: Path) -> None:
    folder, text = save(tmp_path / "lm"), save_text(tmp_path / "text.jsonl")

    def of(name: Path, source: Path) -> list[str]:
        for cached in (origin._lm_origin, origin._text_identity):
            cached.cache_clear()
        cell = cells(name, text=str(source))[0]
        return [*origin._origins(cell, RunSettings())]

    before = of(folder, text)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    moved = text.rename(tmp_path / "moved.jsonl")
    assert of(copy, moved) == before
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["w0"], tokenizer["model"]["vocab"]["w1"] = 2, 1
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    moved.write_text(moved.read_text() + "\n" + json.dumps({"text": "w1", "n": ""}))
    assert all(a != b for a, b in zip(of(copy, moved), before, strict=True))


def test_documents_are_tokenised_as_far_as_the_budget_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.text_shards.SHARD_CHARACTERS", 10_000)
    folder, text = save(tmp_path / "lm"), save_text(tmp_path / "text.jsonl")
    arguments = ["--tokenise", "--preset", "local"]
    changes = {"models": folder, "text": text, "text_column": "text", "context": 16, "tokens": 2048, "k": 2}
    changes |= {"batch_tokens": 256, "shuffle_sequences": 16, "eval_sequences": 8}
    for name, value in changes.items():
        arguments += ["--set", f"{name}={value}"]
    assert tokenise(arguments) == 0
    assert "training sequences of 16 tokens" in capsys.readouterr().out
    cell = cells(folder, text=str(text), text_column="text", tokens=(2048,))[0]
    made = [p.name for p in (tmp_path / "cache").glob("text-*/text-*.parquet")]
    stream = sources.open_stream(cell, RunSettings())
    assert [p.name for p in (tmp_path / "cache").glob("text-*/text-*.parquet")] == made
    assert 128 <= stream.n_train() < 1000
    longer = sources.open_stream(cell, RunSettings(), tokens=16_384)
    assert longer.n_train() >= 1024
    assert np.array_equal(longer.eval_sequences(8), stream.eval_sequences(8))
    assert tokenise(["--tokenise", "--preset", "local"]) == 2
    assert "name documents with --set text=" in capsys.readouterr().err


def refusal(folder: Path, **changes: Any) -> str:
    """What planning or the check before a launch says."""
    with pytest.raises(UserError) as error:  # noqa: PT012
        planned = cells(folder, **changes)
        SWEEP.preflight(planned, grid(folder, **changes), RunSettings())
    return str(error.value)


def test_faults_end_a_launch_before_any_pack(tmp_path: Path) -> None:
    folder, text = save(tmp_path / "lm"), save_text(tmp_path / "text.jsonl")
    mute = save(tmp_path / "mute", tokenizer=False)
    mamba = save(tmp_path / "mamba", "mamba")
    odd = save(tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "hidden_act": "none"}))
    said = {
        refusal(odd, hook="mlp_out"): "transformers has no decoder for",
        refusal(mute): "has no tokenizer (tokenizer.json",
        refusal(mamba, hook="attn_out"): "hook=attn_out is not in block 0 (MambaBlock)",
        refusal(folder, blocks="model.h"): "blocks=model.h is no module list of Qwen2ForCausalLM",
        refusal(
            folder, text=str(text), text_column="body"
        ): "has no text column body; its columns of strings are text, n",
        refusal(
            folder, text=str(tmp_path / "none")
        ): "does not exist; give a file or folder of documents, or OWNER/NAME",
        refusal(folder, text="some/text"): "cannot be asked",
        refusal(folder, text=str(text), tokens=(2**20,)): "the plan needs 1,048,576",
    }
    for line, part in said.items():
        assert part in line
        assert "\n" not in line
    SWEEP.preflight(cells(folder, text=str(text), text_column="text"), grid(folder), RunSettings())


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("pythia-7m", "did you mean pythia-70m"),
        ("some/model", "HF_HUB_OFFLINE is set"),
        ("none.gguf", "no file"),
        (".", "holds no config.json"),
    ],
)
def test_a_model_that_is_none_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--preset", "local", "--set", f"models={model}", "--storage", str(tmp_path / "ledger"), "--plan"]
    assert main(SWEEP, arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert part in line


def test_the_scale_preset_needs_its_weights_and_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = PRESETS["scale"]
    planned = SWEEP.plan(preset)
    assert {(c.layer, c.d_sae) for c in planned if c.model == "qwen2.5-coder-1.5b"} == {(14, 12288)}
    monkeypatch.delenv("PLUMBLINE_WEIGHTS", raising=False)
    wanted = [c for c in planned if c.model == "gemma-3-270m"]
    with pytest.raises(UserError, match=r"fetch_models\.py DIR --only gemma-3-270m` and give --set weights=DIR"):
        SWEEP.preflight(wanted, preset, RunSettings())
    monkeypatch.setenv("PLUMBLINE_WEIGHTS", str(tmp_path))
    assert SWEEP.pin(wanted, RunSettings()).weights == str(tmp_path)
    assert SWEEP.pin(wanted, RunSettings(weights="elsewhere")).weights == "elsewhere"
