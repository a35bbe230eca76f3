"""`codec_lm.py --sample`: audio from a published model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.codec.texts import arm_name
from sweeps.core.cells import UserError
from sweeps.core.machine import prepare_process

if TYPE_CHECKING:
    from torch import Tensor

    from data.codec import Codec
    from models.codec.model import CodecLM
    from models.codec.text import Texts

_CHECKPOINT = "model.pt"


def parser() -> argparse.ArgumentParser:
    """The command line of sampling."""
    p = argparse.ArgumentParser(prog="python sweeps/codec_lm.py", description="WAV files from a published model")
    p.add_argument("--sample", required=True, metavar="CHECKPOINT", help="a cell's folder in the ledger, or a model.pt")
    p.add_argument("--seconds", type=float, default=6.0, help="length of each sample, without the prompt")
    p.add_argument("--n", type=int, default=4, help="number of samples")
    p.add_argument("--out", type=Path, default=Path("samples"), help="folder for the WAV files")
    p.add_argument("--text", metavar="WORDS", help="what the samples say; for a model with text conditioning")
    p.add_argument("--prompt", type=Path, metavar="AUDIO", help="audio file to continue; resampled to the codec's rate")
    p.add_argument(
        "--weights", choices=("ema", "raw", "best"), default="ema", help="averaged, last, or averaged at the best step"
    )
    p.add_argument("--temperature", type=float, default=0.9, help="0 takes the likeliest token")
    p.add_argument("--top-k", type=int, default=100, help="draw from the k likeliest tokens; 0: from all")
    p.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that reach probability p")
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="> 1 makes codes drawn before less likely")
    p.add_argument("--best-of", type=int, default=1, help="samples drawn for each one kept, by likelihood")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--codec-weights", default="", metavar="FILE", help="of EnCodec or DAC, or random; default: as in training"
    )
    return p


def main(argv: list[str]) -> int:
    """Write the WAV files; returns the exit code (2 for bad input)."""
    import sys

    try:
        prepare_process()
        for line in sample(parser().parse_args(argv)):
            print(line)
    except (UserError, ValueError) as error:
        print(f"codec_lm: {error}", file=sys.stderr)
        return 2
    return 0


def sample(arguments: argparse.Namespace) -> list[str]:
    """Write `n` WAV files into `out`; returns what to print. Raises UserError and ValueError (bad sampling values)."""
    import torch

    from models.codec.sampling import Sampling, generate
    from sweeps.codec.audio import wav
    from sweeps.codec.checkpoint import load_codec, load_model, read_checkpoint

    if not arguments.seconds > 0:
        raise UserError(f"seconds={arguments.seconds} gives no frame; choose seconds > 0")
    state = read_checkpoint(*_bytes_of(str(arguments.sample)))
    model = load_model(state, arguments.weights)
    codec = load_codec(state, arguments.codec_weights)
    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k or None,
        top_p=None if arguments.top_p == 1 else arguments.top_p,
        repetition_penalty=arguments.repetition_penalty,
        best_of=arguments.best_of,
    )
    prompt, lines = None, [codec.caveat] if codec.caveat else []
    texts, told = _texts(model, arguments.text, arguments.n)
    lines += told
    if arguments.prompt is not None:
        prompt, said = _prompt(arguments.prompt, codec)
        prompt, lines = prompt.expand(arguments.n, -1, -1), lines + said
    made = generate(
        model,
        max(1, round(arguments.seconds * codec.frame_rate_hz)),
        prompt=prompt,
        batch=arguments.n,
        sampling=sampling,
        seed=arguments.seed,
        texts=texts,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = arm_name(json.loads(state["identity"]))
    with torch.inference_mode():
        waves = codec.decode(made.codes.cpu().numpy())
    for i, wave_N in enumerate(waves):
        file = arguments.out / f"{name}-seed{arguments.seed}-{i:02d}.wav"
        file.write_bytes(wav(wave_N, codec.sample_rate))
        lines.append(f"{file}  {len(wave_N) / codec.sample_rate:.2f} s, {made.log_probability[i]:.3f} nats per token")
    return lines


def _texts(model: CodecLM, text: str | None, n: int) -> tuple[Texts | None, list[str]]:
    """(the text for each of n samples, lines on what the samples are given)."""
    from models.codec.text import encode_texts

    if model.config.text is None:
        if text is not None:
            raise UserError(
                f"--text {text!r}: this model has no text conditioning (its cell is not of text=bytes); leave --text "
                "out, or give a cell of a text study, `--preset text_local` for instance"
            )
        return None, []
    if text is None:
        return None, ["no --text: the model samples without a text, as it was trained to for dropped ones"]
    return encode_texts([text] * max(1, n), model.config.text.max_bytes), [f"text: {text}"]


def _bytes_of(place: str) -> tuple[bytes, str]:
    """(bytes of the checkpoint, its name): of a cell's folder on any storage, or of a bare file."""
    from sweeps.ledger.ledger import Ledger
    from sweeps.ledger.storage import Store

    path = Path(place)
    if path.is_file():
        return path.read_bytes(), place
    folder = place.rstrip("/").removesuffix(f"/{_CHECKPOINT}")
    try:
        return Store(folder).read(_CHECKPOINT), f"{folder}/{_CHECKPOINT}"
    except (FileNotFoundError, NotADirectoryError):
        pass  # on object stores the files lie in a folder below, which the ledger knows
    try:
        storage, sweep, version, key = folder.rsplit("/", 3)
        return Ledger(storage, sweep, version).file(key, _CHECKPOINT), f"{folder}/{_CHECKPOINT}"
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        if isinstance(error, UserError):  # a damaged cell
            raise
        raise UserError(
            f"{place} is neither a checkpoint file nor a published cell of codec_lm; give LEDGER/codec_lm/VERSION/KEY "
            f"or a {_CHECKPOINT}"
        ) from error


def _prompt(file: Path, codec: Codec) -> tuple[Tensor, list[str]]:
    """(codes [1, K, T] of an audio file, lines on what was done to it)."""
    import torch

    from data.audio_io import decode, resample

    try:
        wave_NC, rate, _ = decode(file.read_bytes())
    except (OSError, RuntimeError) as error:
        raise UserError(f"--prompt {file}: {error}") from error
    lines = []
    if rate != codec.sample_rate:
        lines.append(f"prompt resampled from {rate} to {codec.sample_rate} Hz, the rate of {codec.name}")
    wave_N = resample(wave_NC.mean(axis=1), rate, codec.sample_rate)
    codes_BKT = codec.encode(wave_N[None], codec.sample_rate)
    return torch.from_numpy(codes_BKT.astype("int64")), lines
