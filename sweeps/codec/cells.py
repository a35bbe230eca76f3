"""The cells of the sweeps over audio-token models and the fields of their presets."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from sweeps.codec.texts import KINDS, NONE, after_dropout, with_own_text
from sweeps.core.cells import Cell, UserError, nearest

if TYPE_CHECKING:
    from data.melvq import MelVQSpec
    from data.token_batches import TokenClips
ARCHITECTURES = ("olmo_hybrid", "gdn", "transformer", "mamba", "mamba2", "hybrid_1_3", "la", "mc_la", "mc_mamba")
CORPORA = ("synthetic_speech", "asterisk", "ljspeech", "fma")
_LATER = ("dropout", "eval_part", "stop_at")  # fields that came later


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
    eval_part: int = 0  # which `holdout` of the recordings is held out, see `data.split.side_of`
    stop_at: int = 0  # step of the training of `steps` at which it is stopped and measured; 0: not stopped

    def identity(self) -> dict[str, Any]:
        """The fields as plain JSON values; later ones only where they are not 0: older cells have no such fields."""
        return {name: value for name, value in super().identity().items() if name not in _LATER or value}

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
        if not 0 <= self.stop_at < self.steps:
            raise UserError(f"stop_at={self.stop_at} must lie in 0..{self.steps - 1}, below steps; 0 does not stop")
        if not 0 < self.holdout < 1:
            raise UserError(f"holdout={self.holdout} must lie between 0 and 1; 0.05 holds out one recording in twenty")
        if self.eval_part < 0 or (self.eval_part and (self.eval_part + 1) * self.holdout > 1):
            most = int(1 / self.holdout) - 1
            raise UserError(
                f"eval_part={self.eval_part} does not lie within the recordings; choose 0..{most}, or a smaller holdout"
            )

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
        return self.end

    @property
    def end(self) -> int:
        """The step at which training ends."""
        return self.stop_at or self.steps

    def stopped(self, share: float) -> LMCell:
        """The same training, stopped after a share of its steps and measured there; itself for the whole.

        Raises UserError for a cell whose rivals decide how far it is trained.
        """
        if self.rival_seeds:
            raise UserError("rungs and --stop: learning rates compete inside a plan with rungs; leave one of them out")
        step = max(1, round(share * self.steps))
        return replace(self, stop_at=step if step < self.steps else 0)

    def whole(self) -> LMCell:
        """The same training, not stopped: stopped ones continue to it, so all of them share a checkpoint."""
        return replace(self, stop_at=0) if self.stop_at else self

    @property
    def rival_seeds(self) -> tuple[int, ...]:
        """Seeds that decide together which learning rates go on; empty without halving."""
        return ()

    def lm_config(self) -> Any:
        """Configuration of the model to train. Raises UserError for a scale or architecture that is not known."""
        return model_config(self.scale, self.architecture, dropout=self.dropout)

    def training_clips(self, clips: TokenClips) -> TokenClips:
        """Those of the training side that the model is trained on: all of them."""
        return clips

    def usable_clips(self, clips: TokenClips) -> tuple[TokenClips, dict[str, int]]:
        """(clips of a side that the study uses, how many others there are by reason); the same for all its cells."""
        return clips, {}

    def texts_at(self, step: int, texts: Sequence[str]) -> Sequence[str]:
        """Texts that a model with text conditioning is given in training with the clips of a step."""
        return texts


@dataclass(frozen=True, kw_only=True)
class HalvedCell(LMCell):
    """A model whose learning rate competes with others and may be stopped early, at one of the rungs (in steps)."""

    rungs: tuple[int, ...]
    eta: int
    rivals: tuple[float, ...]
    seeds: tuple[int, ...]

    @property
    def contest(self) -> str:
        """The same text for cells whose learning rates compete with each other."""
        return replace(self, lr=self.rivals[0], seed=self.seeds[0]).key

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
        return model_config(self.scale, self.architecture, text=self.text != NONE, dropout=self.dropout)

    def usable_clips(self, clips: TokenClips) -> tuple[TokenClips, dict[str, int]]:
        from models.codec.presets import text_config

        try:
            max_bytes = text_config(self.scale).max_bytes
        except ValueError as error:
            raise UserError(str(error)) from error
        max_frames = self.lm_config().max_frames
        return with_own_text(clips, chunk_s=self.chunk_s, max_frames=max_frames, max_bytes=max_bytes)

    def texts_at(self, step: int, texts: Sequence[str]) -> Sequence[str]:
        return after_dropout(texts, self.text_dropout, self.seed, step)


@dataclass(frozen=True, kw_only=True)
class TokenStudy:
    """Fields of a preset that say what is trained on, and how."""

    corpus: str
    corpus_clips: int = 0
    audio_path: str = ""  # folder or archive of the corpus
    codec: str
    codec_weights: str = ""  # a file, `random`, or nothing for the package's own
    chunk_s: float = 8.0
    min_s: float = 1.0
    holdout: float = 0.05
    steps: int
    batch_size: int
    micro_batch: int = 0  # clips of a batch held at once; 0: all
    warmup_steps: int
    lr_end: float = 1e-5
    ema_decay: float = 0.999
    precision: str = "bfloat16"
    eval_every: int
    eval_clips: int
    eval_part: int = 0  # which `holdout` of the recordings is held out; a search's best setting is measured on the next
    needs_gpu: bool = True

    def __post_init__(self) -> None:
        for name in ("audio_path", "codec_weights"):  # trials run in folders of their own
            path = getattr(self, name)
            if path and path != "random":
                object.__setattr__(self, name, os.path.abspath(path))

    def check_source(self, corpora: Iterable[str], note: str = "") -> None:
        """Raise UserError for a corpus that is not one of `corpora`, an unknown codec, or two that do not go together.

        note: what to add to the list of corpora.
        """
        corpora = tuple(corpora)
        if self.corpus not in corpora:
            raise UserError(
                f"corpus {self.corpus!r} is not known{nearest(self.corpus, corpora)}; "
                f"corpora: {', '.join(corpora)}{note}"
            )
        if self.codec not in CODECS:
            raise UserError(
                f"codec {self.codec!r} is not known{nearest(self.codec, CODECS)}; codecs: {', '.join(CODECS)}"
            )
        if self.corpus == "synthetic_speech" and (self.codec != "melvq" or self.codec_weights):
            raise UserError(
                f"corpus=synthetic_speech with codec={self.codec}: synthetic_speech goes with its own melvq; choose "
                "another corpus, or codec=melvq without codec_weights"
            )


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
    sample_n: int = 32  # generated clips per model, for the distances to real audio
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


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def model_config(scale: str, architecture: str, *, text: bool = False, dropout: float = 0.0) -> Any:
    from models.codec.presets import scale_config

    try:
        return replace(scale_config(scale, architecture, text=text), dropout=dropout)
    except ValueError as error:
        raise UserError(str(error)) from error


CODECS = ("melvq", "encodec", "dac")
_FRAME_HZ = {"melvq": 62.5, "encodec": 75.0, "dac": 44_100 / 512, "symbols": 1.0}
CURVE_CLIPS = 64  # held-out clips of a measurement during training, where there are as many


def columns(config: Any, chunk_s: float, codec: str) -> int:
    """Columns of a clip of full length, with the delay pattern, cut to the context."""
    return min(int(chunk_s * _FRAME_HZ[codec]) + config.n_codebooks - 1, config.context)
