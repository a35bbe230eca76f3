"""Audio-token language models: do hybrids learn codec tokens better than a transformer or Mamba of the same size?

python sweeps/codec_lm.py                         synthetic speech, a stand-in codec, small models: minutes
python sweeps/codec_lm.py --preset asterisk       real speech (benchmarks/fetch_test_audio.py), the same small models
python sweeps/codec_lm.py --preset speech_a100 --set audio_path=LJSpeech-1.1     the study's 21.9M models (GPU)
python sweeps/codec_lm.py --preset music_a100 --set audio_path=FMA               the study's 294M models (GPU)
python sweeps/codec_lm.py --preset text_local     the same with and without each clip's transcript: does it help?
python sweeps/codec_lm.py --sample runs/ledger/codec_lm/2/KEY --seconds 4 --n 4 --out DIR   WAVs of a finished model
python sweeps/codec_lm.py --tokenise --preset speech_a100 --set audio_path=LJSpeech-1.1 --actors 4   tokens beforehand
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sweeps._codec_text import KINDS, NONE, after_dropout, arm_name, with_own_text
from sweeps._lm_plan import CPU_FLOPS, CURVE_CLIPS, GPU_BASIS, TRACKED, TokenStudy, packs, threads, work
from sweeps.core.cells import Cell, Estimate, Pack, PublishedCell, UserError, nearest
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings

if TYPE_CHECKING:
    from data.melvq import MelVQSpec
    from data.pack import TokenClips

ARCHITECTURES = ("olmo_hybrid", "gdn", "transformer", "mamba", "mamba2", "hybrid_1_3", "la", "mc_la", "mc_mamba")
CORPORA = ("synthetic_speech", "asterisk", "ljspeech", "fma")


@dataclass(frozen=True, kw_only=True)
class LMCell(Cell):
    """One trained and evaluated language model."""

    SWEEP: ClassVar[str] = "codec_lm"
    VERSION: ClassVar[str] = "2"

    scale: str
    architecture: str
    seed: int
    lr: float
    corpus: str
    corpus_clips: int  # of a synthetic corpus; 0: all recordings there are
    codec: str
    chunk_s: float
    min_s: float
    holdout: float
    steps: int
    batch_size: int
    warmup_steps: int
    lr_end: float
    ema_decay: float
    precision: str
    eval_every: int
    eval_clips: int
    dropout: float = 0.0

    def identity(self) -> dict[str, Any]:
        """The fields as plain JSON values; `dropout` only where there is some, as cells had none for long."""
        return {name: value for name, value in super().identity().items() if name != "dropout" or value}

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.eval_clips < 2:
            raise UserError(f"eval_clips={self.eval_clips} gives no interval; choose 2 or more")
        if self.warmup_steps >= self.steps:
            raise UserError(
                f"warmup_steps={self.warmup_steps} leaves no step of {self.steps}; choose warmup_steps < steps"
            )
        if not 0 <= self.lr_end <= self.lr or self.lr <= 0:
            raise UserError(f"lr={self.lr} must be positive and lr_end={self.lr_end} in 0..lr")
        if self.precision not in ("float32", "bfloat16"):
            raise UserError(f"precision={self.precision!r} is not known; choose float32 or bfloat16")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must lie in 0..1, below 1; 0.1 drops a tenth")
        if not 0 < self.holdout < 1:
            raise UserError(f"holdout={self.holdout} must lie between 0 and 1; 0.05 holds out one recording in twenty")

    @property
    def curve_clips(self) -> int:
        """Held-out clips of each measurement during training; the one after it takes all `eval_clips`."""
        return min(self.eval_clips, CURVE_CLIPS)

    @property
    def weight(self) -> float:
        """Rough work of the cell, for packs of equal length: recurrent blocks take about twice the time."""
        return (
            self.mean_steps
            * self.batch_size
            * (2.0 if "mamba" in self.architecture or "hybrid" in self.architecture else 1.0)
        )

    @property
    def mean_steps(self) -> float:
        """Steps that the cell trains; with halving the mean over its rivals, as nobody knows who goes on."""
        return self.steps

    @property
    def rival_seeds(self) -> tuple[int, ...]:
        """Seeds that decide together which learning rates go on; empty without halving."""
        return ()

    def lm_config(self) -> Any:
        """Configuration of the model to train. Raises UserError for a scale or architecture that is not known."""
        return _config(self.scale, self.architecture, dropout=self.dropout)

    def training_clips(self, clips: TokenClips) -> TokenClips:
        """Those of the training side that the model is trained on: all of them."""
        return clips

    def usable_clips(self, clips: TokenClips) -> tuple[TokenClips, dict[str, int]]:
        """(clips of a side that the study uses, how many others there are by reason); the same for all its cells."""
        return clips, {}

    def texts_at(self, step: int, texts: Sequence[str]) -> Sequence[str]:
        """Texts that a model with text conditioning is given in training beside the clips of a step."""
        return texts


@dataclass(frozen=True, kw_only=True)
class HalvedCell(LMCell):
    """A model whose learning rate competes with others and may be stopped early, at one of the rungs (in steps)."""

    rungs: tuple[int, ...]
    eta: int
    rivals: tuple[float, ...]
    seeds: tuple[int, ...]

    @property
    def rival_seeds(self) -> tuple[int, ...]:
        return self.seeds

    @property
    def mean_steps(self) -> float:
        alive, reached, total = len(self.rivals), 0, 0
        for rung in (*self.rungs, self.steps):
            total += alive * (rung - reached)
            alive, reached = math.ceil(alive / self.eta), rung
        return total / len(self.rivals)


@dataclass(frozen=True, kw_only=True)
class TextCell(LMCell):
    """A model of a text study: given the transcripts of its clips (text=bytes), or without them on the same clips."""

    text: str
    text_dropout: float  # share of clips in training whose text is left out

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text not in KINDS:
            raise UserError(f"text={self.text!r} is not known{nearest(self.text, KINDS)}; kinds: {', '.join(KINDS)}")
        if not 0 <= self.text_dropout < 1:
            raise UserError(f"text_dropout={self.text_dropout} must lie in 0..1, below 1; 0.1 drops one text in ten")

    def lm_config(self) -> Any:
        return _config(self.scale, self.architecture, text=self.text != NONE, dropout=self.dropout)

    def usable_clips(self, clips: TokenClips) -> tuple[TokenClips, dict[str, int]]:
        from models.lm_presets import text_config

        try:
            max_bytes = text_config(self.scale).max_bytes
        except ValueError as error:
            raise UserError(str(error)) from error
        max_frames = self.lm_config().max_frames
        return with_own_text(clips, chunk_s=self.chunk_s, max_frames=max_frames, max_bytes=max_bytes)

    def texts_at(self, step: int, texts: Sequence[str]) -> Sequence[str]:
        return after_dropout(texts, self.text_dropout, self.seed, step)


@dataclass(frozen=True, kw_only=True)
class Study(TokenStudy):
    """A preset. Every field can be changed with `--set field=value` (lists with commas)."""

    scale: str
    architectures: tuple[str, ...] = ARCHITECTURES
    seeds: tuple[int, ...] = (42,)
    lr: tuple[float, ...]
    lr_of: tuple[str, ...] = ()  # architecture:rate, ...: own grids instead of `lr`
    rungs: tuple[int, ...] = ()  # steps at which only the best 1/eta learning rates go on; none: all go to the end
    eta: int = 2
    sample_s: float = 6.0  # of each generated clip; 0: none
    sample_n: int = 32  # generated clips a model, for the distances to real audio
    text: tuple[str, ...] = ()  # none, bytes: a text study, each architecture without and with transcripts
    text_dropout: float = 0.1
    dropout: float = 0.0  # share of what each mixer and MLP adds that is dropped in training

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_s < 0 or self.sample_n < 2:
            raise UserError(f"sample_s={self.sample_s} must be >= 0 and sample_n={self.sample_n} at least 2")
        if self.rungs and (self.eta < 2 or list(self.rungs) != sorted({r for r in self.rungs if 0 < r < self.steps})):
            raise UserError(
                f"rungs={','.join(map(str, self.rungs))} with eta={self.eta}: rungs must rise and lie in "
                f"1..{self.steps - 1} (steps), and eta be at least 2"
            )
        if self.rungs and self.text:
            raise UserError(
                f"rungs={','.join(map(str, self.rungs))} with text={','.join(self.text)}: learning rates do not "
                "compete in a text study; set one of the two to nothing"
            )
        for entry in self.lr_of:
            name, _, rate = entry.partition(":")
            if name not in self.architectures or not _is_number(rate):
                raise UserError(
                    f"lr_of={entry!r} is not ARCHITECTURE:RATE of a planned architecture; write for example "
                    f"--set lr_of={self.architectures[0]}:1e-3,{self.architectures[0]}:3e-3"
                )

    def rates(self, architecture: str) -> tuple[float, ...]:
        """Learning rates of an architecture, each once."""
        own = [float(rate) for name, _, rate in (e.partition(":") for e in self.lr_of) if name == architecture]
        return tuple(dict.fromkeys(own or self.lr))

    def melvq(self) -> MelVQSpec:
        """Shape of the stand-in codec where the preset trains its own."""
        from data.melvq import MelVQSpec

        return MelVQSpec()


PRESETS: dict[str, Study] = {
    "local": Study(
        scale="local",
        lr=(8e-3, 1.6e-2),
        corpus="synthetic_speech",
        corpus_clips=200,
        codec="melvq",
        chunk_s=4.0,
        min_s=3.0,
        holdout=0.15,
        steps=50,
        batch_size=4,
        warmup_steps=10,
        lr_end=1e-4,
        ema_decay=0.95,
        precision="float32",
        eval_every=25,
        eval_clips=24,
        sample_s=4.0,
        sample_n=12,
        needs_gpu=False,
    ),
    "asterisk": Study(
        scale="local",
        seeds=(0, 1),
        lr=(4e-3, 1.6e-2),
        corpus="asterisk",
        codec="melvq",
        min_s=1.0,
        holdout=0.15,
        steps=160,
        batch_size=4,
        warmup_steps=16,
        lr_end=1e-4,
        ema_decay=0.95,
        precision="float32",
        eval_every=80,
        eval_clips=64,
        sample_s=4.0,
        needs_gpu=False,
    ),
    "speech_a100": Study(
        scale="speech",
        architectures=(*ARCHITECTURES, "hybrid_1_7"),
        lr=(1.5e-4, 3e-4, 6e-4),  # the published rate and its neighbours
        corpus="ljspeech",
        codec="encodec",
        steps=12_000,
        batch_size=24,
        warmup_steps=500,
        eval_every=200,
        eval_clips=666,
    ),
    "music_a100": Study(
        scale="music",
        architectures=(*ARCHITECTURES, "gdn_hybrid", "hybrid_1_7"),
        lr=(1e-4, 2e-4, 4e-4),
        corpus="fma",
        codec="dac",
        chunk_s=24.0,  # 2,067 frames of DAC; each use is cropped to the context at a seeded place
        min_s=12.0,
        steps=200_000,
        batch_size=32,
        micro_batch=8,
        warmup_steps=2000,
        eval_every=2000,
        eval_clips=256,
        sample_s=20.0,
        dropout=0.1,  # the published model's
    ),
}
_TEXT = ("none", "bytes")
PRESETS |= {
    # utterances of a word or three: what letters sound like must be learned in minutes, before the clips are by heart
    "text_local": replace(
        PRESETS["local"],
        architectures=("transformer", "mamba"),
        lr=(8e-3,),
        text=_TEXT,
        corpus_clips=800,
        chunk_s=0.9,
        min_s=0.5,
        steps=200,
        batch_size=24,
        warmup_steps=20,
        eval_every=100,
        eval_clips=128,
        sample_s=0.8,
        sample_n=16,
    ),
    "text_asterisk": replace(
        PRESETS["asterisk"],
        architectures=("olmo_hybrid", "transformer"),
        text=_TEXT,
    ),
    "speech_text_a100": replace(
        PRESETS["speech_a100"],
        architectures=("olmo_hybrid", "transformer"),
        seeds=(42, 43),
        text=_TEXT,
        chunk_s=10.2,  # above the longest sentence: every recording is one clip
    ),
}


def _units(cells: Sequence[Cell]) -> list[list[LMCell]]:
    """Cells of an architecture, with or without text, and seed. Rates that compete stay together, with all seeds."""
    units: dict[tuple[str, int], list[LMCell]] = {}
    for cell in cells:
        assert isinstance(cell, LMCell)
        units.setdefault((arm_name(cell.identity()), -1 if cell.rival_seeds else cell.seed), []).append(cell)
    return list(units.values())


class CodecLMSweep:
    """The sweep behind the command line; the work is in `_codec_run`, the tokens in `_codec_data`."""

    name = LMCell.SWEEP
    version = LMCell.VERSION
    question = "which architecture learns audio-codec tokens best at matched size?"
    headline = "nats below unigram"
    named = ("architecture", "text", "lr", "seed")
    tracked = TRACKED
    default_preset = "local"
    presets = PRESETS

    def plan(self, preset: Study) -> Sequence[LMCell]:
        preset.check_source(CORPORA)
        for architecture, kind in product(preset.architectures, preset.text or (NONE,)):
            _config(preset.scale, architecture, text=kind != NONE)
        varied = ("architecture", "lr", "seed")
        shared = {f.name: getattr(preset, f.name) for f in fields(LMCell) if f.name not in varied}
        cells = [
            LMCell(architecture=architecture, lr=lr, seed=seed, **shared)
            for architecture in preset.architectures
            for lr, seed in product(preset.rates(architecture), preset.seeds)
        ]
        if preset.text:
            return [
                TextCell(**cell.identity(), text=kind, text_dropout=0.0 if kind == NONE else preset.text_dropout)
                for cell in cells
                for kind in dict.fromkeys(preset.text)
            ]
        if not preset.rungs:
            return cells
        return [
            HalvedCell(
                **cell.identity(),
                rungs=preset.rungs,
                eta=preset.eta,
                rivals=preset.rates(cell.architecture),
                seeds=preset.seeds,
            )
            for cell in cells
        ]

    def pack(self, cells: Sequence[Cell], preset: Study, machine: Machine, run: RunSettings) -> list[Pack]:
        def name(number: int, group: Sequence[LMCell]) -> str:
            return f"{arm_name(group[0].identity())}-{group[0].seed}" if preset.needs_gpu else f"pack{number}"

        return packs(_units(cells), preset, machine, run, name)

    def threads(self, planned: Sequence[Cell], preset: Study, machine: Machine, run: RunSettings) -> int:
        return threads(len(_units(planned)), preset, machine, run)

    def run(self, pack: Pack, preset: Study, context: Any) -> None:
        from sweeps.launch.workers import fit

        fit("sweeps._codec_run:run_pack", pack, preset, context)

    def fingerprint(self, cell: Cell, preset: Study, run: RunSettings) -> str:
        from sweeps._codec_data import fingerprint

        assert isinstance(cell, LMCell)
        return fingerprint(cell, preset)

    def preflight(self, cells: Sequence[Cell], preset: Study, run: RunSettings) -> None:
        from sweeps._codec_data import check

        check(preset)

    def estimate(self, cells: Sequence[Cell], preset: Study, machine: Machine, run: RunSettings) -> Estimate:
        total = work(cells, preset)
        seconds, basis = total.flops / (CPU_FLOPS * machine.cpus), "16 GFLOP/s a core, seen on one machine"
        if preset.needs_gpu:
            seconds, basis = total.gpu_seconds(machine), GPU_BASIS
        return Estimate(
            tokens=total.tokens,
            flops=total.flops,
            memory_bytes=total.memory_bytes,
            seconds=seconds,
            basis=f"{basis}; all clips of full length, which is an upper bound",
        )

    def report(self, cells: Sequence[PublishedCell], preset_name: str, preset: Study, out: Path) -> list[str]:
        from sweeps._codec_report import write

        whole = [c for c in cells if not (c.rows["metric"] == "stopped_at").any()]
        if not whole:
            raise UserError("every published cell was stopped early; run the command again to finish the others")
        lines = write(whole, preset_name, preset, out)
        stopped = len(cells) - len(whole)
        return lines + ([f"halving      {stopped} cells were stopped early and are left out"] if stopped else [])

    def banner(self, preset_name: str, preset: Study) -> list[str]:
        from sweeps._codec_data import banner

        return banner(preset)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _config(scale: str, architecture: str, *, text: bool = False, dropout: float = 0.0) -> Any:
    from models.lm_presets import scale_config

    try:
        return replace(scale_config(scale, architecture, text=text), dropout=dropout)
    except ValueError as error:
        raise UserError(str(error)) from error


def with_settings(arguments: Sequence[str]) -> list[str]:
    """The command line with `--codec-weights X`, the codecs' own spelling, written as `--set codec_weights=X`."""
    out, name = list(arguments), "--codec-weights"
    for i in reversed(range(len(out))):
        if out[i].startswith(f"{name}="):
            out[i : i + 1] = ["--set", f"codec_weights={out[i].removeprefix(name)[1:]}"]
        elif out[i] == name and i + 1 < len(out):
            out[i : i + 2] = ["--set", f"codec_weights={out[i + 1]}"]
    return out


SWEEP = CodecLMSweep()

if __name__ == "__main__":
    names = {argument.split("=")[0] for argument in sys.argv[1:]}
    if "--sample" in names:
        from sweeps._codec_sample import main as sample

        sys.exit(sample(sys.argv[1:]))
    if "--tokenise" in names:
        from sweeps._codec_tokenise import main as tokenise

        sys.exit(tokenise(with_settings(sys.argv[1:])))
    from sweeps.launch.command import main

    sys.exit(main("sweeps.codec_lm", with_settings(sys.argv[1:])))
