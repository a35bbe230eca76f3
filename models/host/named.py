"""What the name of a model that is in no table means: a folder, a GGUF file, or a repository on the hub.

Read from its config alone, so that a launch can plan with any decoder-only model: nothing of its own code is run
(``trust_remote_code`` is never set) and no pickle is opened.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from models.host.hub import hub_file
from models.host.layout import block_lists
from models.host.specs import HOST_LMS, HostLMSpec, depths_of

Kind = Literal["table", "gguf", "folder", "hub"]
GGUF = ".gguf"
WEIGHTS = ".safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")
"""Files that decide which tokens a model's text becomes."""


class UnknownModel(ValueError):
    """A name that is no model's; the message names the nearest of the table."""


def kind_of(name: str) -> Kind:
    """What ``name`` is; raises UnknownModel for what is none of these, ValueError for a path that holds no model."""
    if name in HOST_LMS:
        return "table"
    if name.endswith(GGUF):
        if not Path(name).is_file():
            raise ValueError(f"model={name} is no file; give the path of a GGUF file")
        return "gguf"
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(
                f"model={name} holds no config.json; give a directory in Hugging Face format (config.json, "
                "*.safetensors)"
            )
        return "folder"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return "hub"
    near = difflib.get_close_matches(name, HOST_LMS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(HOST_LMS)}"
    raise UnknownModel(
        f"model={name} is unknown; {hint} (or a model on the hub as OWNER/NAME, a local directory, a .gguf file)"
    )


def hub_id_of(name: str) -> str:
    """The repository on the hub that a model is read from; empty for others."""
    if name in HOST_LMS:
        return HOST_LMS[name].hub_id or ""
    return name if kind_of(name) == "hub" else ""


def content_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that decide its numbers: weights, config, tokenizer; raises ValueError without weights.

    Sub-folders (copies in other formats) are left alone.
    """
    weights = sorted(f for f in folder.glob(f"*{WEIGHTS}") if not f.name.startswith((".", "_")))
    if not weights:
        raise ValueError(f"{folder} holds no *{WEIGHTS}; other formats are not read: convert the checkpoint")
    named = [folder / name for name in ("config.json", *TOKENIZERS)]
    return [*weights, *(file for file in named if file.is_file())]


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_spec(name: str, folder: Path) -> HostLMSpec:
    """Sizes of a checkpoint in Hugging Face format, from its config; raises ValueError for what is no decoder."""
    return _spec(name, folder, f"local checkpoint {folder.name}")


@lru_cache(maxsize=32)
def hub_spec(name: str, revision: str | None) -> HostLMSpec:
    """`folder_spec` of a repository on the hub; raises LMUnavailable where it cannot be read."""
    config = hub_file(name, "config.json", revision)
    if config is None:
        raise ValueError(f"{name} holds no config.json on the hub; choose a model in Hugging Face format")
    return _spec(name, config.parent, f"{name} from the Hugging Face hub", hub_id=name)


def _spec(name: str, folder: Path, note: str, hub_id: str | None = None) -> HostLMSpec:
    config, model = _skeleton(name, folder)
    text = config.get_text_config()
    n_layers = text.num_hidden_layers
    lists = block_lists(model, n_layers)
    blocks = max(lists.values(), key=lambda m: sum(p.numel() for p in m.parameters()))
    multiplied = sum(p.numel() for p in blocks.parameters() if p.ndim == 2) // n_layers
    return HostLMSpec(
        origin="hub" if hub_id else "directory",
        architecture=text.model_type,
        d_model=text.hidden_size,
        n_layers=n_layers,
        n_heads=getattr(text, "num_attention_heads", 0) or 0,
        n_key_value_heads=getattr(text, "num_key_value_heads", None),
        d_mlp=getattr(text, "intermediate_size", 0) or 0,
        d_vocab=text.vocab_size,
        depths=depths_of(n_layers),
        tied_head=bool(getattr(config, "tie_word_embeddings", False)),
        hub_id=hub_id,
        note=note,
        counted=(multiplied, sum(p.numel() for p in model.parameters())),
    )


@contextmanager
def transformers_own() -> Iterator[None]:
    """Within it a model type that transformers knows means transformers' own model.

    Importing flash-linear-attention puts its models in place of Mamba, Mamba-2 and BitNet; those need a GPU and other
    names of weights. Types that only another library knows stay.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    registered = CONFIG_MAPPING._extra_content
    hidden = {kind: registered.pop(kind) for kind in list(registered) if kind in CONFIG_MAPPING_NAMES}
    try:
        yield
    finally:
        registered.update(hidden)


def _skeleton(name: str, folder: Path) -> tuple[Any, Any]:
    """(config, model on the meta device) of a checkpoint; raises ValueError where it is no decoder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with transformers_own():
            config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the config of {name} cannot be used: {_reason(error)}") from error
    if config.is_encoder_decoder:
        raise ValueError(f"{name} ({config.model_type}) is an encoder with a decoder; choose a decoder-only model")
    classes = config.architectures or []
    if classes and not any(c.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for c in classes):
        raise ValueError(f"{name} is a {classes[0]}, no causal language model; choose a decoder-only model")
    try:
        with torch.device("meta"):
            return config, AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"transformers has no decoder for {name} ({config.model_type}): {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One line; custom code is refused in the project's own words."""
    text = str(error)
    if "trust_remote_code" in text or "execute" in text:
        return "it wants code of its own to be run, which is never done; choose a model that transformers has itself"
    line = (text.strip().splitlines() or [type(error).__name__])[0][:200]
    return f"{line}; choose a decoder-only model that transformers has"
