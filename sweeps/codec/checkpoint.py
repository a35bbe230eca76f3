"""The file `model.pt` of a published model: what it holds, and how it becomes a model and a codec again.

It stands alone: configuration, raw, averaged and best averaged weights, the codec's description, and the stand-in
codec itself where that was trained here (EnCodec's and DAC's weights belong to their packages and are only named).
And, while a cell is in training, which of its checkpoints may be continued.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from sweeps.codec.codec_choice import open_weights
from sweeps.core.cells import Cell, UserError

if TYPE_CHECKING:
    from data.codec import Codec
    from models.codec.model import CodecLM

FORMAT = "2"


def checkpoint_facts(cell: Cell, codec: Codec) -> dict[str, Any]:
    """All of the file but the configuration and the weights of the model."""
    from data.codec import MelVQCodec

    facts: dict[str, Any] = {
        "format": FORMAT,
        "sweep": cell.SWEEP,
        "key": cell.key,
        "identity": json.dumps(cell.identity()),
        "codec": json.dumps(codec.describe()),
    }
    if isinstance(codec, MelVQCodec):
        model = codec.model
        facts["melvq"] = {
            "spec": json.dumps(asdict(model.spec)),
            "mean": model.mean_M,
            "centroids": model.centroids_KVM,
        }
    return facts


def read_checkpoint(data: bytes, name: str) -> dict[str, Any]:
    """The contents of a model.pt. Raises UserError for another file, or one of another version of the format."""
    import torch

    try:
        state = torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for foreign bytes
        raise UserError(f"{name} is no checkpoint of this program ({type(error).__name__}); give a model.pt") from error
    if not isinstance(state, dict) or not {"config", "raw", "ema"} <= set(state):
        raise UserError(f"{name} holds no model of codec_lm (config, raw and ema weights); give the model.pt of a cell")
    found = state.get("format", "1")
    if found != FORMAT:
        raise UserError(
            f"{name} is a checkpoint of VERSION {found}, this code reads VERSION {FORMAT}; sample it with the commit "
            "named in its cell.json, or train again"
        )
    return state


def load_model(state: dict[str, Any], weights: str) -> CodecLM:
    """The model of a `model.pt`, in eval mode, with its `raw`, `ema` or `best` weights; the last `ema` may be the best.

    Raises UserError for weights that do not fit their configuration.
    """
    from models.codec.model import CodecLMConfig, build_codec_lm, config_of

    config = json.loads(state["config"])
    unknown = sorted(set(config) - {f.name for f in fields(CodecLMConfig)})
    try:
        if unknown:
            raise TypeError(f"fields {', '.join(unknown)} are not known")
        model = build_codec_lm(config_of(config))
        model.load_state_dict(state["ema" if weights == "best" and "best" not in state else weights])
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"the checkpoint is of another architecture than its configuration says ({reason}); use the commit named "
            "in cell.json"
        ) from error
    return model.eval()


def load_codec(state: dict[str, Any], weights: str) -> Codec:
    """The codec whose tokens the model was trained on: from the file, from `weights`, or from its package.

    Raises UserError when its weights are missing or are others than those of training.
    """
    from data.codec import MelVQCodec
    from data.melvq import MelVQ, MelVQSpec

    described = json.loads(state["codec"])
    codec: Codec
    if "melvq" in state and not weights:
        stored = state["melvq"]
        codec = MelVQCodec(MelVQ(MelVQSpec(**json.loads(stored["spec"])), stored["mean"], stored["centroids"]))
    else:
        if not weights and described["weights"] == "random":
            weights = "random"
        if not weights and described["weights"] == "file":
            raise UserError(
                f"the model was trained on tokens of {described['name']} with weights {described['weights_hash']} from "
                "a file; give that file with --codec-weights FILE"
            )
        codec = open_weights(described["name"], weights)
    if codec.weights_hash != described["weights_hash"]:
        raise UserError(
            f"the model was trained on tokens of {described['name']} with weights {described['weights_hash']}, here "
            f"they are {codec.weights_hash}; give the right ones with --codec-weights FILE"
        )
    return codec
