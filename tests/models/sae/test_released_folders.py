"""SAEs of other people: each class as SAELens and dictionary_learning write it, equal functions, nothing that acts."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from models.sae.folders import LensSAE, describe, read_folder, reconstructor
from models.sae.jumprelu import JumpReLUSAE
from models.sae.model import TopKSAE

D, M = 24, 160
METADATA = {"model_name": "standin-small", "hook_name": "blocks.3.hook_resid_post", "context_size": 32}


def randomised(sae: Any) -> Any:
    """Random weights, biases and thresholds, decoder rows of unequal length."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values.abs() * 2 if name == "threshold" else values / 3)
        sae.W_dec *= torch.rand(M, 1, generator=generator) + 0.5
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(2.0)
    return sae


def save(kind: str, folder: Path) -> Path:
    """An SAE of one of SAELens' classes, saved by SAELens."""
    from sae_lens import saes
    from sae_lens.saes.sae import SAEMetadata

    sizes: dict[str, Any] = {"d_in": D, "d_sae": M, "metadata": SAEMetadata(**METADATA)}
    name, _, variant = kind.partition(" ")
    if variant:
        sizes |= {"normalize_activations": variant} if variant != "plain" else {"apply_b_dec_to_input": False}
    plain = {
        "standard": (saes.StandardSAE, saes.StandardSAEConfig),
        "gated": (saes.GatedSAE, saes.GatedSAEConfig),
        "jumprelu": (saes.JumpReLUSAE, saes.JumpReLUSAEConfig),
        "topk": (saes.TopKSAE, saes.TopKSAEConfig),
    }
    if name in plain:
        sae_class, config_class = plain[name]
        randomised(sae_class(config_class(**sizes, **({"k": 9} if name == "topk" else {})))).save_model(folder)
        return folder
    widths = {"matryoshka_widths": [40, M]} if name == "matryoshka" else {}
    stem = "MatryoshkaBatchTopK" if widths else "BatchTopK"
    config = getattr(saes, f"{stem}TrainingSAEConfig")(**sizes, k=9, **widths)
    randomised(getattr(saes, f"{stem}TrainingSAE")(config)).save_inference_model(folder)
    return folder


KINDS = {
    "standard": JumpReLUSAE,
    "standard plain": JumpReLUSAE,
    "standard layer_norm": LensSAE,
    "gated": LensSAE,
    "jumprelu": JumpReLUSAE,
    "jumprelu constant_norm_rescale": LensSAE,
    "topk": TopKSAE,
    "topk plain": TopKSAE,
    "topk layer_norm": LensSAE,
    "batchtopk": JumpReLUSAE,
    "matryoshka": JumpReLUSAE,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_of_saelens_is_read_with_its_function(kind: str, tmp_path: Path) -> None:
    """Reconstructions to 1e-6 of their size and the same active features as SAELens' own module."""
    from sae_lens import SAE

    folder = save(kind, tmp_path / "sae")
    about = describe(folder)
    assert (about.sae_class, about.d_in, about.d_sae) == (kind.split(" ")[0], D, M)
    assert (about.model, about.hook_name, about.context) == tuple(METADATA.values())
    assert about.k == (9 if kind.startswith("topk") else 0)
    sae = read_folder(folder)
    assert type(sae) is KINDS[kind]
    x = torch.randn(3, 11, D, generator=torch.Generator().manual_seed(1)) * 2
    theirs = SAE.load_from_disk(folder)
    with torch.no_grad():
        acts = theirs.encode(x)
        wanted = theirs.decode(acts)
    x_hat, index, value = reconstructor(sae)(x)
    assert (x_hat - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    dense = torch.zeros(3, 11, M).scatter_add(-1, index, value)
    torch.testing.assert_close(dense, acts, rtol=1e-5, atol=1e-5)
    assert 0 < (acts > 0).float().mean() < 1


def dictionary(kind: str, folder: Path, **changes: Any) -> Path:
    """A folder as dictionary_learning writes it."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 3

    state = {"encoder.weight": random(M, D), "encoder.bias": random(M), "decoder.weight": random(D, M)}
    state |= {
        "AutoEncoder": {"bias": random(D)},
        "AutoEncoderTopK": {"b_dec": random(D), "threshold": torch.tensor(1.0)},
    }.get(kind, {"b_dec": random(D), "threshold": torch.tensor(1.2)})
    if kind == "JumpReluAutoEncoder":
        state = {"W_enc": random(D, M), "W_dec": random(M, D), "b_enc": random(M), "b_dec": random(D)}
        state["threshold"] = random(M).abs()
    if kind == "GatedAutoEncoder":
        state = {"encoder.weight": random(M, D), "decoder.weight": random(D, M), "decoder_bias": random(D)}
        state |= {"r_mag": random(M), "gate_bias": random(M), "mag_bias": random(M)}
    trainer = {
        "dict_class": kind,
        "activation_dim": D,
        "dict_size": M,
        "k": 9,
        "layer": 3,
        "lm_name": "o/standin-small",
    }
    folder.mkdir()
    config = {"trainer": trainer | {"submodule_name": "resid_post_layer_3"} | changes, "buffer": {"ctx_len": 32}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "ae.pt")
    return folder


def formula(kind: str, state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Each class as dictionary_learning defines it."""
    W_enc = state["W_enc"] if "W_enc" in state else state["encoder.weight"].T
    W_dec = state["W_dec"] if "W_dec" in state else state["decoder.weight"].T
    b_dec = next(state[name] for name in ("b_dec", "bias", "decoder_bias") if name in state)
    xc = x if kind == "JumpReluAutoEncoder" else x - b_dec
    if kind == "GatedAutoEncoder":
        pi = xc @ W_enc
        acts = (pi + state["gate_bias"] > 0) * (pi * state["r_mag"].exp() + state["mag_bias"]).relu()
    else:
        a = xc @ W_enc + state["b_enc" if "b_enc" in state else "encoder.bias"]
        if kind == "AutoEncoderTopK":
            top = a.relu().topk(9)
            acts = torch.zeros_like(a).scatter(-1, top.indices, top.values)
        else:
            acts = a.relu() * (a > state.get("threshold", torch.tensor(0.0)))
    return acts @ W_dec + b_dec


@pytest.mark.parametrize(
    ("kind", "sae_class"),
    [
        ("AutoEncoder", "standard"),
        ("GatedAutoEncoder", "gated"),
        ("AutoEncoderTopK", "topk"),
        ("JumpReluAutoEncoder", "jumprelu"),
        ("BatchTopKSAE", "batchtopk"),
        ("MatryoshkaBatchTopKSAE", "matryoshka"),
    ],
)
def test_dictionary_learnings_classes_are_read_with_their_functions(kind: str, sae_class: str, tmp_path: Path) -> None:
    folder = dictionary(kind, tmp_path / "sae")
    about = describe(folder)
    assert (about.sae_class, about.hook_name, about.context) == (sae_class, "blocks.3.hook_resid_post", 32)
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(1)) * 2
    wanted = formula(kind, torch.load(folder / "ae.pt", weights_only=True), x)
    x_hat, _, _ = reconstructor(read_folder(folder))(x)
    assert (x_hat - wanted).abs().max() <= 1e-6 * wanted.abs().max()


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_nothing_that_is_handed_over_can_act(tmp_path: Path) -> None:
    """A pickle in the weights' place, by itself or inside a state_dict, is refused in one line and does not run."""
    sprung = tmp_path / "sprung"
    folder = dictionary("AutoEncoder", tmp_path / "a")
    for payload in (Trap(sprung), {"encoder.weight": torch.zeros(M, D), "bias": Trap(sprung)}):
        torch.save(payload, folder / "ae.pt")
        with pytest.raises(ValueError, match="holds more than weights, or is damaged; it is not read") as caught:
            read_folder(folder)
        assert "\n" not in str(caught.value)
    (folder / "ae.pt").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError, match="it is not read"):
        read_folder(folder)
    lens = save("standard", tmp_path / "lens")
    (lens / "sae_weights.safetensors").unlink()
    (lens / "sae_weights.pt").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError, match=r"sae_weights\.pt is a pickle, which can run code"):
        read_folder(lens)
    (lens / "sae_weights.safetensors").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        read_folder(lens)
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalize_activations": "expected_average_only_in"}, "does not say by how much"),
        ({"normalize_activations": "covariance_whitening"}, "does not hold the statistics"),
        ({"normalize_activations": "by_magic"}, "normalize_activations='by_magic' is not known"),
        ({"architecture": "temporal"}, "architecture='temporal' is not supported; standard, gated, jumprelu, topk are"),
        ({"d_in": 7}, "weights and config do not fit"),
        ({"d_sae": "many"}, "d_sae='many'; these are no sizes"),
        ({"architecture": "topk"}, "gives k=None; it needs a whole number"),
    ],
)
def test_configs_that_do_not_tell_are_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save("standard", tmp_path / "sae")
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message) as caught:
        read_folder(folder)
    assert "\n" not in str(caught.value)


def test_other_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no cfg\.json of SAELens and no config\.json"):
        describe(tmp_path)
    with pytest.raises(ValueError, match="dict_class='CrossCoder' is not supported"):
        describe(dictionary("AutoEncoder", tmp_path / "a", dict_class="CrossCoder"))
    (tmp_path / "cfg.json").write_text("[1]")
    with pytest.raises(ValueError, match="no JSON object"):
        describe(tmp_path)
