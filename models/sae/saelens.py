"""SAEs on disk in SAELens' format: cfg.json and sae_weights.safetensors in one folder.

Written so that `sae_lens.SAE.load_from_disk(folder)` gives an SAE with our encode and decode, and read back without
SAELens. As SAELens does for inference models, decoder norms are folded into the encoder, which changes neither the
selection nor the reconstruction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from models.sae.jumprelu import JumpReLUSAE
from models.sae.model import TopKSAE

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")
# the release whose format this module was written against, named when SAELens itself is not installed
FORMAT_VERSION = "6.54.0"

UNPROCESSED: dict[str, Any] = {
    "model_class_name": "HookedTransformer",
    "model_from_pretrained_kwargs": {
        "fold_ln": False,
        "center_writing_weights": False,
        "center_unembed": False,
        "fold_value_biases": False,
    },
}
"""How SAELens and TransformerLens load the language model as SAEs are trained on it here: no folding, no centring.
SAELens' own evaluation passes the arguments on; `HookedTransformer.from_pretrained` would process the weights."""


def sae_lens_version() -> str:
    """Version of the installed SAELens, or the one whose format this module writes."""
    try:
        return version("sae-lens")
    except PackageNotFoundError:
        return FORMAT_VERSION


def save_saelens(sae: TopKSAE | JumpReLUSAE, path: str | Path, metadata: Mapping[str, Any]) -> None:
    """Write `sae` to the folder `path` (made when missing): as a TopK SAE, or as SAELens' JumpReLU SAE.

    `metadata` (model_name, hook_name, context_size, dataset_path, …; JSON values) goes into the config with
    `sae_lens_version`, which SAELens needs to read the format, and UNPROCESSED; the caller's entries win.

    Raises ValueError when the metadata is not JSON.
    """
    folder = Path(path)
    described = {"sae_lens_version": sae_lens_version(), "sae_lens_training_version": None, **UNPROCESSED, **metadata}
    config = {
        "architecture": "topk" if isinstance(sae, TopKSAE) else "jumprelu",
        **sae.architecture(),
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": described,
    }
    try:
        text = json.dumps(config, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata of the SAE is not JSON ({error}); give strings, numbers, lists, dicts") from error
    weights = sae.folded() if isinstance(sae, TopKSAE) and sae.rescale_acts_by_decoder_norm else sae
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "W_enc": weights.W_enc.detach().cpu().T.contiguous(),
        "W_dec": weights.W_dec.detach().cpu().contiguous(),
        "b_enc": weights.b_enc.detach().cpu(),
        "b_dec": weights.b_dec.detach().cpu(),
    }
    if isinstance(weights, JumpReLUSAE):
        tensors["threshold"] = weights.threshold.detach().cpu()
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_saelens(path: str | Path) -> tuple[TopKSAE, dict[str, Any]]:
    """Read a TopK SAE that SAELens 6 or `save_saelens` wrote; returns it (on the CPU) and its metadata.

    Raises FileNotFoundError when a file is missing and ValueError for another architecture, for input scaling that
    this project does not use, or for weights that are missing, left over or of shapes that disagree with the config.
    """
    folder = Path(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; give the folder that save_saelens or SAELens wrote")
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    for key, wanted in (("architecture", "topk"), ("normalize_activations", "none"), ("reshape_activations", "none")):
        found = config.get(key, wanted if key != "architecture" else None)
        if found != wanted:
            raise ValueError(f"{key}={found!r} in {folder / CONFIG_FILE} is not supported; only {wanted!r} is")
    sae = TopKSAE(
        d_in=config["d_in"],
        d_sae=config["d_sae"],
        k=config["k"],
        rescale_acts_by_decoder_norm=config.get("rescale_acts_by_decoder_norm", False),
        apply_b_dec_to_input=config.get("apply_b_dec_to_input", True),
    )
    tensors = load_file(folder / WEIGHTS_FILE)
    if set(tensors) != set(_TENSORS):
        lacks = ", ".join(sorted(set(_TENSORS) - set(tensors))) or "nothing"
        more = ", ".join(sorted(set(tensors) - set(_TENSORS))) or "nothing"
        raise ValueError(
            f"{folder / WEIGHTS_FILE} lacks {lacks} and holds {more} besides {', '.join(_TENSORS)}; "
            "give the folder of a TopK SAE"
        )
    tensors["W_enc"] = tensors["W_enc"].T
    for name in _TENSORS:
        weight = getattr(sae, name)
        if tensors[name].shape != weight.shape:
            shapes = f"{tuple(tensors[name].shape)}, expected {tuple(weight.shape)}"
            raise ValueError(f"{name} in {folder / WEIGHTS_FILE} has shape {shapes}; config and weights do not fit")
        weight.copy_(tensors[name])
    return sae, config.get("metadata", {})
