"""`codec_lm.py --sample`: audio from a published model."""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeps._sweep import UserError

if TYPE_CHECKING:
    from models.codec_lm import CodecLM


def parser() -> argparse.ArgumentParser:
    """The command line of sampling."""
    p = argparse.ArgumentParser(prog="python sweeps/codec_lm.py", description="WAV files from a published model")
    p.add_argument("--sample", required=True, metavar="CELL", help="a cell's folder in the ledger (or its model.pt)")
    p.add_argument("--seconds", type=float, default=6.0, help="length of each sample")
    p.add_argument("--n", type=int, default=4, help="number of samples")
    p.add_argument("--out", type=Path, default=Path("samples"), help="folder for the WAV files")
    p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or last weights")
    p.add_argument("--temperature", type=float, default=0.9)
    p.add_argument("--top-k", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--codec-weights", default="", metavar="FILE", help="of EnCodec or DAC; default: the package's own")
    return p


def main(argv: list[str]) -> int:
    """Write the WAV files; returns the exit code (2 for bad input)."""
    import sys

    try:
        for line in sample(parser().parse_args(argv)):
            print(line)
    except (UserError, ValueError) as error:
        print(f"codec_lm: {error}", file=sys.stderr)
        return 2
    return 0


def sample(arguments: argparse.Namespace) -> list[str]:
    """Write `n` WAV files into `out`; returns what to print. Raises UserError and ValueError (bad sampling values)."""
    import numpy as np
    import soundfile
    import torch

    from models.sampling import Sampling, generate
    from sweeps._storage import Store

    if not arguments.seconds > 0:
        raise UserError(f"seconds={arguments.seconds} gives no frame; choose seconds > 0")
    store = Store(str(arguments.sample).removesuffix("model.pt").rstrip("/"))
    meta, tokens = store.read_json("cell.json"), store.read_json("tokens.json")
    if meta is None or tokens is None:
        raise UserError(f"{store.uri} is no published cell of codec_lm; give LEDGER/codec_lm/VERSION/KEY")
    state = torch.load(io.BytesIO(store.read("model.pt")), weights_only=True)
    model = load_model(state, arguments.weights)
    codec = _codec(meta["identity"], tokens["codec"], arguments.codec_weights)
    frames = max(1, round(arguments.seconds * codec.frame_rate_hz))
    sampling = Sampling(temperature=arguments.temperature, top_k=arguments.top_k)
    made = generate(model, frames, batch=arguments.n, sampling=sampling, seed=arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = [codec.caveat] if codec.caveat else []
    for i, wave_N in enumerate(codec.decode(made.codes.numpy())):
        file = arguments.out / f"{meta['identity']['architecture']}-seed{arguments.seed}-{i:02d}.wav"
        soundfile.write(file, np.clip(wave_N, -1, 1), codec.sample_rate, subtype="PCM_16")
        lines.append(f"{file}  {len(wave_N) / codec.sample_rate:.2f} s, {made.log_probability[i]:.3f} nats a token")
    return lines


def load_model(state: dict[str, Any], weights: str) -> CodecLM:
    """The model of a `model.pt`, in eval mode. Raises UserError for weights that do not fit its configuration."""
    from models.codec_lm import CodecLMConfig, build_codec_lm
    from models.memory_cache import MemoryCacheConfig

    fields = json.loads(state["config"])
    if fields["memory_cache"] is not None:
        fields["memory_cache"] = MemoryCacheConfig(**fields["memory_cache"])
    try:
        model = build_codec_lm(CodecLMConfig(**fields))
        model.load_state_dict(state[weights])
    except (TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"model.pt does not fit this code ({reason}); use the commit named in cell.json") from error
    return model.eval()


def _codec(identity: dict[str, Any], described: dict[str, Any], weights: str) -> Any:
    from sweeps._codec_data import SYNTHETIC, open_source, open_weights
    from sweeps.codec_lm import PRESETS

    if identity["corpus"] == SYNTHETIC:
        names = ("corpus", "corpus_clips", "codec", "chunk_s", "min_s", "holdout")
        study = replace(PRESETS["local"], **{name: identity[name] for name in names})
        codec = open_source(study, "cpu", lambda line: None).codec
    else:
        codec = open_weights(identity["codec"], weights)
    if codec.weights_hash != described["weights_hash"]:
        raise UserError(
            f"the model was trained on tokens of {described['name']} with weights {described['weights_hash']}, here "
            f"they are {codec.weights_hash}; give the right ones with --codec-weights FILE"
        )
    return codec
