"""The memory-caching study as cells: a base setting, one variable changed at a time, and a control for each of them.

An arm is one setting with memory caching; its control is the same model without caches at the same size, data and
learning rate, its MLP widened until the parameters agree with the base setting of that size. Arms that differ
only in what a model without caches does not have share a control.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from sweeps.codec.cells import LMCell, Study, TokenStudy, columns
from sweeps.core.cells import UserError, nearest

if TYPE_CHECKING:
    from data.melvq import MelVQSpec
    from data.token_batches import TokenClips
SHARED = ("scale", "train_clips", "lr")  # a model without caches has these too
CACHE = ("segment", "start_layer", "gate_bias_init", "normalized_retrieval", "rank", "cumulative")
VARIABLES = (*SHARED, *CACHE)
CONTROL, CACHED = "la", "mc_la"
_WIDE = 256  # from this width on, MLP widths stay multiples of 8

_RECALL_FRAMES = 26
PLANTED_SETTING: Mapping[str, Any] = {
    "scale": "recall",
    "train_clips": 0,
    "lr": 3e-2,
    "segment": 8,
    "start_layer": 1,
    "gate_bias_init": -2.0,
    "normalized_retrieval": False,
    "rank": 0,
    "cumulative": True,
    "corpus": "recall",
    "corpus_clips": 5000,
    "codec": "symbols",
    "chunk_s": float(_RECALL_FRAMES),
    "min_s": 1.0,
    "holdout": 0.05,
    "steps": 150,
    "batch_size": 32,
    "warmup_steps": 20,
    "lr_end": 3e-3,
    "ema_decay": 0.9,
    "precision": "float32",
    "eval_every": 50,
    "eval_clips": 64,
}


@dataclass(frozen=True, kw_only=True)
class CacheCell(LMCell):
    """One model with memory caching, or its control (architecture la, the base setting's options)."""

    SWEEP: ClassVar[str] = "memory_cache"
    VERSION: ClassVar[str] = "1"

    train_clips: int  # of the training side; 0: all
    segment: int
    start_layer: int
    gate_bias_init: float
    normalized_retrieval: bool
    rank: int  # of W_u; 0: the full matrix
    cumulative: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        steps, config = self._columns(), self._cached_config()
        if self.segment >= steps:
            raise UserError(
                f"segment={self.segment} is not shorter than the {steps} steps of a clip, so no token would see a "
                f"cache; choose segment < {steps}"
            )
        if self.rank > config.d_model:
            raise UserError(
                f"rank={self.rank} exceeds d_model={config.d_model}; choose a rank up to that, or 0 for the full matrix"
            )
        if self.train_clips < 0:
            raise UserError(f"train_clips={self.train_clips} must be >= 0; 0 takes all")

    @property
    def weight(self) -> float:
        """Rough work: tokens, times two with caches."""
        return self.end * self.batch_size * self._columns() * (1.0 if self.architecture == CONTROL else 2.0)

    def _columns(self) -> int:
        return columns(_size(self.scale), self.chunk_s, self.codec)

    def _cached_config(self) -> Any:
        from models.mixers.memory_cache import MemoryCacheConfig

        try:
            cache = MemoryCacheConfig(
                segment=self.segment,
                start_layer=self.start_layer,
                rank=self.rank or None,
                gate_bias_init=self.gate_bias_init,
                normalized_retrieval=self.normalized_retrieval,
                cumulative=self.cumulative,
            )
            return replace(_size(self.scale), memory_cache=cache)
        except ValueError as error:
            raise UserError(str(error)) from error

    def lm_config(self) -> Any:
        """With caches: the size's shape with this cell's options. Without: the same, its MLP widened to match."""
        from models.codec.cost import lm_cost, match_parameters

        cached = self._cached_config()
        if self.architecture != CONTROL:
            return cached
        multiple = 8 if cached.d_model >= _WIDE else 1
        return match_parameters(replace(cached, memory_cache=None), lm_cost(cached).parameters, multiple=multiple)

    def training_clips(self, clips: TokenClips) -> TokenClips:
        """The `train_clips` of smallest identity hash."""
        if not self.train_clips:
            return clips
        try:
            return clips.take(self.train_clips)
        except ValueError as error:
            raise UserError(f"train_clips={self.train_clips}: {error}, or 0 for all") from error


def _size(scale: str) -> Any:
    from models.codec.presets import MC_LA_SIZES

    if scale not in MC_LA_SIZES:
        raise UserError(f"scale={scale!r} is not known{nearest(scale, MC_LA_SIZES)}; sizes: {', '.join(MC_LA_SIZES)}")
    return MC_LA_SIZES[scale]


@dataclass(frozen=True)
class _Study(Study):
    codebooks: int = 8
    codebook_size: int = 1024

    def melvq(self) -> MelVQSpec:
        from data.melvq import MelVQSpec

        return MelVQSpec(n_codebooks=self.codebooks, codebook_size=self.codebook_size)


@dataclass(frozen=True, kw_only=True)
class CacheStudy(TokenStudy):
    """A preset. The first value of each variable is the base setting, and each other value is one arm.

    variables: those that are varied; the others keep their base value. together: variables set to their last value all
    at once in one more arm, as the source study changed them (none: no such arm). rank 0 is the full matrix,
    train_clips 0 all. planted: also train on the recall task, which needs memory, to see that the instrument finds it.
    """

    variables: tuple[str, ...] = VARIABLES
    together: tuple[str, ...] = ()
    scale: tuple[str, ...]
    train_clips: tuple[int, ...]
    lr: tuple[float, ...]
    segment: tuple[int, ...]
    start_layer: tuple[int, ...]
    gate_bias_init: tuple[float, ...]
    normalized_retrieval: tuple[bool, ...] = (False, True)
    rank: tuple[int, ...]
    cumulative: tuple[bool, ...] = (True, False)
    planted: bool = True
    seeds: tuple[int, ...]
    codebooks: int = 8  # of a melvq trained here
    codebook_size: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("variables", "together"):
            for name in getattr(self, field):
                if name not in VARIABLES:
                    raise UserError(
                        f"{field}: {name!r} is no variable of this study{nearest(name, VARIABLES)}; "
                        f"variables: {', '.join(VARIABLES)}"
                    )
        for name in (*VARIABLES, "seeds"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty; give at least one value, the base setting's first")

    def token_study(self, *, planted: bool) -> Study:
        """What `tokens` and `run` need to know of this study, or of its planted task."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        if planted:
            own |= {name: value for name, value in PLANTED_SETTING.items() if name in own}
            own |= {"audio_path": "", "codec_weights": "", "micro_batch": 0, "needs_gpu": False}
            own["lr"] = (PLANTED_SETTING["lr"],)
        names = {f.name for f in fields(_Study)} - {"scale", "architectures", "sample_s", "sample_n"}
        chosen = {name: value for name, value in own.items() if name in names}
        return _Study(scale="", sample_s=0.0, **chosen)
