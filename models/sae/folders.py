"""SAEs that other people trained: folders of SAELens and of dictionary_learning, read as weights and nothing else.

Shape suffixes: B tokens, D = d_in, M = d_sae, K entries per token, padded.

A folder's config is JSON and its weights are safetensors, or for dictionary_learning a torch file that is read with
`weights_only=True`, which runs nothing; other pickles are refused. SAELens' own loader builds the SAE. Standard,
JumpReLU and TopK SAEs without input scaling are then taken over into this project's inference, which decodes the
features that fire alone; all others (gated, scaled per token) are run by SAELens' module.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.sae.jumprelu import JumpReLUSAE, padded
from models.sae.model import TopKSAE, row_chunks
from models.sae.saelens import CONFIG_FILE, WEIGHTS_FILE, load_saelens
from models.sae.screen import encoder

DICTIONARY_FILES = ("config.json", "ae.pt")  # of dictionary_learning
ARCHITECTURES = ("standard", "gated", "jumprelu", "topk")
_TRAINED_AS = {"matryoshka_batchtopk": "matryoshka", "batchtopk": "batchtopk"}
_PER_TOKEN = ("constant_norm_rescale", "layer_norm")  # scalings that need nothing but the token itself
_UNKNOWN_SCALE = {
    "expected_average_only_in": "was trained on scaled activations, and the folder does not say by how much",
    "covariance_whitening": "was trained on whitened activations, and the folder does not hold the statistics",
}
_DICTIONARY_CLASSES = {
    **{"AutoEncoder": "standard", "GatedAutoEncoder": "gated", "AutoEncoderTopK": "topk"},
    **dict.fromkeys(("JumpReluAutoEncoder", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"), "jumprelu"),
}


@dataclass(frozen=True)
class Description:
    """What a folder's config says of its SAE, before any weight is read.

    `sae_class`: standard, gated, jumprelu, topk, batchtopk or matryoshka; `k` 0 unless topk; `model`, `hook_name` and
    `context` empty or 0 where the metadata lacks them.
    """

    folder: Path
    files: tuple[Path, ...]
    sae_class: str
    d_in: int
    d_sae: int
    k: int
    model: str
    hook_name: str
    context: int


class LensSAE:
    """An SAE that SAELens' own module runs, a block of rows at a time."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.d_in, self.d_sae = int(module.cfg.d_in), int(module.cfg.d_sae)

    @torch.no_grad()
    def reconstruct(self, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x̂ of x [..., d_in], and the features that fire with their activations, [..., K] as `padded` says."""
        flat_BD = x_BD.reshape(-1, self.d_in).float()
        x_hat_BD, parts = torch.empty_like(flat_BD), []
        for rows in row_chunks(len(flat_BD), 4 * self.d_sae):
            acts_BM = self.module.encode(flat_BD[rows])
            x_hat_BD[rows] = self.module.decode(acts_BM)
            parts.append(padded(acts_BM))
        width = max(index.shape[1] for index, _ in parts)
        index, value = (
            torch.cat([torch.nn.functional.pad(part[i], (0, width - part[i].shape[1])) for part in parts])
            for i in (0, 1)
        )
        shape = x_BD.shape[:-1]
        return x_hat_BD.view(x_BD.shape), index.view(*shape, width), value.view(*shape, width)


AnySAE = TopKSAE | JumpReLUSAE | LensSAE
Reconstruct = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def reconstructor(sae: AnySAE) -> Reconstruct:
    """x [..., d_in] -> (x̂ [..., d_in], features [..., K], activations [..., K]) of a finished SAE."""
    if isinstance(sae, LensSAE):
        return sae.reconstruct
    encode = encoder(sae)

    def reconstruct(x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index, value = encode(x_BD)
        return sae.decode(index, value), index, value

    return reconstruct


def describe(folder: str | Path) -> Description:
    """What the SAE in a folder is.

    Raises ValueError (one line) where the folder holds no SAE, a pickle in the weights' place, an architecture that is
    not supported, a scaling that it does not tell, or a config without sizes.
    """
    folder = Path(folder)
    if (folder / CONFIG_FILE).is_file():
        config = _json(folder / CONFIG_FILE)
        files = (folder / CONFIG_FILE, folder / WEIGHTS_FILE)
    elif (folder / DICTIONARY_FILES[0]).is_file():
        config = _of_dictionary_learning(_json(folder / DICTIONARY_FILES[0]), folder)
        files = (folder / DICTIONARY_FILES[0], folder / DICTIONARY_FILES[1])
    else:
        raise ValueError(f"{folder} holds no {CONFIG_FILE} of SAELens and no config.json of dictionary_learning")
    if not files[1].is_file():
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in (".pt", ".pth", ".pkl", ".bin"))
        found = f"; {pickles[0]} is a pickle, which can run code: save it as {WEIGHTS_FILE}" if pickles else ""
        raise ValueError(f"{folder} holds no {files[1].name}{found}")
    metadata = {**config, **(config.get("metadata") or {})}
    architecture = _architecture(config)
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{folder}: architecture={architecture!r} is not supported; {', '.join(ARCHITECTURES)} are")
    scaling = config.get("normalize_activations") or "none"
    scaling = "expected_average_only_in" if scaling is True else str(scaling)
    if scaling in _UNKNOWN_SCALE:
        raise ValueError(f"{folder}: the SAE {_UNKNOWN_SCALE[scaling]} ({scaling}); fold the scaling into its weights")
    if scaling not in ("none", *_PER_TOKEN):
        raise ValueError(f"{folder}: normalize_activations={scaling!r} is not known; fold the scaling into the weights")
    d_in, d_sae = config.get("d_in"), config.get("d_sae")
    if not isinstance(d_in, int) or not isinstance(d_sae, int) or min(d_in, d_sae) < 1:
        raise ValueError(f"{folder}: the config gives d_in={d_in!r} and d_sae={d_sae!r}; these are no sizes")
    trained = str(metadata.get("training_architecture", ""))
    return Description(
        folder=folder,
        files=files,
        sae_class=_TRAINED_AS.get(trained, architecture) if architecture == "jumprelu" else architecture,
        d_in=d_in,
        d_sae=d_sae,
        k=_k(config, folder) if architecture == "topk" else 0,
        model=str(metadata.get("model_name") or ""),
        hook_name=str(metadata.get("hook_name") or metadata.get("hook_point") or ""),
        context=int(metadata.get("context_size") or 0),
    )


def read_folder(folder: str | Path, device: torch.device | str = "cpu") -> AnySAE:
    """The SAE of a folder, in float32. Raises ValueError (one line) as `describe`, and where weights do not fit."""
    about = describe(folder)
    config = _json(about.files[0])
    plain = config.get("normalize_activations", "none") == "none" and config.get("reshape_activations") == "none"
    if about.sae_class == "topk" and plain and about.files[0].name == CONFIG_FILE and "metadata" in config:
        return load_saelens(about.folder)[0].to(device)
    module = _module(about, str(device))
    if module.cfg.normalize_activations != "none" or module.cfg.architecture() == "gated":
        return LensSAE(module)
    if module.cfg.architecture() == "topk":
        own = TopKSAE(
            d_in=about.d_in,
            d_sae=about.d_sae,
            k=about.k,
            rescale_acts_by_decoder_norm=bool(module.cfg.rescale_acts_by_decoder_norm),
            apply_b_dec_to_input=bool(module.cfg.apply_b_dec_to_input),
            device=device,
        )
        return _filled(own, module)
    jumping = JumpReLUSAE(
        d_in=about.d_in, d_sae=about.d_sae, apply_b_dec_to_input=bool(module.cfg.apply_b_dec_to_input), device=device
    )
    if hasattr(module, "threshold"):
        jumping.threshold.copy_(module.threshold)
    return _filled(jumping, module)


def _filled(sae: Any, module: Any) -> Any:
    sae.W_enc.copy_(module.W_enc.T)
    for name in ("W_dec", "b_enc", "b_dec"):
        getattr(sae, name).copy_(getattr(module, name))
    return sae


def _module(about: Description, device: str) -> Any:
    """SAELens' module of a folder, on the device, float32."""
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
    from sae_lens.registry import get_sae_class

    config, state = _parts(about)
    config = handle_config_defaulting({**config, "dtype": "float32", "device": device})
    sae_class, config_class = get_sae_class(config["architecture"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a hint on how to load the language model
            module = sae_class(config_class.from_dict(config))
        module.process_state_dict_for_loading(state)
        module.load_state_dict(state)
    except (RuntimeError, TypeError, KeyError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{about.folder}: weights and config do not fit: {text[:200]}") from error
    return module.to(torch.float32).to(device).eval().requires_grad_(False)


def _parts(about: Description) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and weights in SAELens' form."""
    if about.files[0].name == CONFIG_FILE:
        from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
        from safetensors import SafetensorError

        try:
            return sae_lens_disk_loader(about.folder, "cpu", {"dtype": "float32"})
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{about.files[1]} cannot be read as safetensors ({error}); save the SAE again") from error
    return _of_dictionary_learning(_json(about.files[0]), about.folder), _dictionary_weights(about)


def _dictionary_weights(about: Description) -> dict[str, torch.Tensor]:
    """Weights of dictionary_learning's `ae.pt` under SAELens' names."""
    try:
        found = torch.load(about.files[1], map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{about.files[1]} holds more than weights, or is damaged; it is not read, since a pickle can run code: "
            f"save the SAE with save_model of SAELens, or its state_dict alone"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{about.files[1]} is no state_dict of tensors; save the SAE's state_dict")
    names = {"encoder.bias": "b_enc", "bias": "b_dec", "decoder_bias": "b_dec", "mag_bias": "b_mag"}
    names |= {"gate_bias": "b_gate"}
    out = {names.get(name, name): value.float() for name, value in found.items() if not name.endswith(".weight")}
    for name, weight in (("W_enc", "encoder.weight"), ("W_dec", "decoder.weight")):
        if weight in found:
            out[name] = found[weight].float().T.contiguous()
    wanted = {"W_enc", "W_dec", "b_dec"}
    if about.sae_class == "gated":
        wanted |= {"b_mag", "b_gate", "r_mag"}
    else:
        wanted |= {"b_enc"} | ({"threshold"} if about.sae_class not in ("standard", "topk") else set())
    if lacking := wanted - set(out):
        raise ValueError(f"{about.files[1]} lacks {', '.join(sorted(lacking))}; give a {about.sae_class} SAE's folder")
    if "threshold" in wanted and out["threshold"].ndim == 0:
        out["threshold"] = out["threshold"].expand(about.d_sae).contiguous()
    return {name: out[name] for name in wanted}


def _of_dictionary_learning(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """dictionary_learning's config.json in the form of SAELens 6."""
    trainer = config.get("trainer")
    kind = trainer.get("dict_class") if isinstance(trainer, Mapping) else None
    if not isinstance(trainer, Mapping) or kind not in _DICTIONARY_CLASSES:
        raise ValueError(f"{folder}: dict_class={kind!r} is not supported; {', '.join(_DICTIONARY_CLASSES)} are")
    trained = {"BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka_batchtopk"}.get(kind, "")
    submodule = str(trainer.get("submodule_name") or "resid_post")
    hook = next((name for name in ("resid_pre", "mlp_out", "attn_out") if name in submodule), "resid_post")
    layer = trainer.get("layer")
    return {
        "architecture": _DICTIONARY_CLASSES[kind],
        "d_in": trainer.get("activation_dim"),
        "d_sae": trainer.get("dict_size"),
        **({"k": int(trainer["k"])} if kind == "AutoEncoderTopK" and "k" in trainer else {}),
        # dictionary_learning's JumpReLU does not subtract b_dec before it encodes
        "apply_b_dec_to_input": kind != "JumpReluAutoEncoder",
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": trainer.get("lm_name") or "",
            "hook_name": f"blocks.{layer}.hook_{hook}" if isinstance(layer, int) else "",
            "context_size": (config.get("buffer") or {}).get("ctx_len") or 0,
            "training_architecture": trained,
        },
    }


def _architecture(config: Mapping[str, Any]) -> str:
    """The class that a config names; before SAELens 6 TopK was an activation of the standard class."""
    activation = config.get("activation_fn") or config.get("activation_fn_str")
    return "topk" if activation == "topk" else str(config.get("architecture") or "standard")


def _k(config: Mapping[str, Any], folder: Path) -> int:
    k = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"{folder}: the config of a TopK SAE gives k={k!r}; it needs a whole number of 1 or more")
    return k


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}); give a folder that SAELens wrote") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no JSON object; give a folder that SAELens wrote")
    return found
