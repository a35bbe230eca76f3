"""A cell of the SAE proxy gap, the fields of its presets, and the trainer's configuration that follows from a cell."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from models.host.specs import HOOKS, HOST_LMS, RESID_POST
from models.information.settings import CriticSettings
from sweeps.core.cells import Cell, UserError, nearest

if TYPE_CHECKING:
    from models.sae.trainer import SAEConfig

DEPTHS = ("early", "mid", "late")
RUNGS = ("all", "free")
SWITCH = ("off", "on")
SAES = ("topk", "batchtopk", "matryoshka")
# of the later fields those that training does not depend on
_EVALUATED = ("rungs", "legibility", "information", "eval_part")
_LATER: Mapping[str, Any] = {
    "drop_positions": 0,
    "max_norm_multiple": 0.0,
    "hook": RESID_POST,
    "blocks": "",
    "text": "",
    "text_column": "",
    "rungs": "all",
    "sae": "topk",
    "legibility": "off",
    "information": "off",
    "eval_part": 0,
}
"""Fields that came later, with the values that keep them out of a cell's identity: older cells keep their keys."""
_LATER_TRAINED = tuple(name for name in _LATER if name not in _EVALUATED)


@dataclass(frozen=True, kw_only=True)
class SAECell(Cell):
    """One trained and evaluated SAE. Shapes and rates are those of the training stream's model."""

    SWEEP: ClassVar[str] = "proxy_gap"
    VERSION: ClassVar[str] = "1"

    model: str
    layer: int
    depth: str
    k: int
    seed: int
    tokens: int  # training budget
    stream: str  # "pile", "embedded" or "text"
    context: int
    d_sae: int
    batch_tokens: int
    shuffle_sequences: int  # sequences whose activations are mixed before they are cut into batches
    lr: float
    schedule: str
    warmup_steps: int
    decay_steps: int
    aux_coefficient: float
    dead_after_steps: int
    eval_sequences: int
    lm_dtype: str
    # tokens that neither training nor evaluation looks at; part of the identity where they are set
    drop_positions: int = 0
    max_norm_multiple: float = 0.0
    hook: str = RESID_POST  # which activation of the block
    blocks: str = ""  # name of the model's block list, where it is not found
    text: str = ""  # of the stream "text": where its documents are, and which column holds them
    text_column: str = ""
    rungs: str = "all"  # which rungs of the ladder are measured
    sae: str = "topk"  # topk, batchtopk or matryoshka
    legibility: str = "off"  # whether probes ask which classes of tokens the features tell apart
    information: str = "off"  # whether the layer's task-relevant dimension is measured, too
    eval_part: int = 0  # which `eval_sequences` of the held-out ones: the first, the next, ...

    def identity(self) -> dict[str, Any]:
        fields = super().identity()
        for name, usual in _LATER.items():
            if fields[name] == usual:
                del fields[name]
        return fields

    def __post_init__(self) -> None:
        if self.k > self.d_sae:
            raise UserError(f"k={self.k} exceeds d_sae={self.d_sae}; choose k <= d_sae")
        if self.k < 1:
            raise UserError(f"k={self.k} leaves no feature active; choose k >= 1")
        if self.tokens % self.batch_tokens:
            low = self.tokens // self.batch_tokens * self.batch_tokens
            raise UserError(
                f"tokens={self.tokens} is not a multiple of batch_tokens={self.batch_tokens}; choose tokens="
                f"{low or self.batch_tokens} or {low + self.batch_tokens}"
            )
        if self.shuffle_sequences * self.context % self.batch_tokens:
            raise UserError(
                f"shuffle_sequences={self.shuffle_sequences} x context={self.context} is not a multiple of "
                f"batch_tokens={self.batch_tokens}; change shuffle_sequences"
            )
        spec = HOST_LMS.get(self.model)
        if spec is not None and not 0 <= self.layer < spec.n_layers:
            raise UserError(f"layer={self.layer} is out of range for {self.model}; choose 0 to {spec.n_layers - 1}")
        if self.hook not in HOOKS:
            raise UserError(f"hook={self.hook!r} is not known; choose one of {', '.join(HOOKS)}")
        if self.schedule not in ("constant", "wsd"):
            raise UserError(
                f"schedule={self.schedule!r} cannot serve nested budgets; choose constant, or wsd (one decay branch "
                "per budget)"
            )
        if self.schedule == "wsd" and self.steps < self.warmup_steps + self.decay_steps:
            raise UserError(
                f"tokens={self.tokens} are {self.steps} steps, fewer than warmup_steps={self.warmup_steps} + "
                f"decay_steps={self.decay_steps}; choose a larger budget or shorter phases"
            )
        if self.sae not in SAES:
            raise UserError(f"sae={self.sae!r} is not known{nearest(self.sae, SAES)}; choose {', '.join(SAES)}")
        self._check_evaluation()

    def _check_evaluation(self) -> None:
        """What evaluation needs, whoever trained the SAE."""
        if self.lm_dtype not in ("float32", "bfloat16"):
            raise UserError(f"lm_dtype={self.lm_dtype!r} is not known; choose float32 or bfloat16")
        if self.eval_part < 0:
            raise UserError(
                f"eval_part={self.eval_part} names no part; choose 0 for the first held-out sequences, or more"
            )
        for name, known in (("rungs", RUNGS), ("legibility", SWITCH), ("information", SWITCH)):
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)!r} is not known; choose {' or '.join(known)}")
        if self.legibility != "off" and self.stream == "pile":
            raise UserError(
                "legibility=on needs the documents that tokens come from, and stream=pile holds tokens alone; choose "
                "stream=embedded, or name documents with --set text="
            )
        self._check_information()
        if not 0 <= self.drop_positions < self.context:
            raise UserError(
                f"drop_positions={self.drop_positions} leaves no token of context={self.context}; choose 0 to "
                f"{self.context - 1}"
            )
        if self.max_norm_multiple and not 1 < self.max_norm_multiple < math.inf:
            raise UserError(
                f"max_norm_multiple={self.max_norm_multiple:g} would leave out half of the tokens; choose more than 1 "
                "median norm, or 0 to keep all"
            )

    def _check_information(self) -> None:
        if self.information == "on":
            try:
                CriticSettings().require(self.eval_sequences, self.context)
            except ValueError as error:
                raise UserError(f"information=on with eval_sequences={self.eval_sequences}: {error}") from error

    @property
    def remedy(self) -> str:
        """What to do when the SAE's outputs are not numbers."""
        return f"lower lr={self.lr:g}"

    @property
    def steps(self) -> int:
        """Training steps of the budget."""
        return self.tokens // self.batch_tokens

    @property
    def held_out_end(self) -> int:
        """Held-out sequences up to the last that the SAE is evaluated on."""
        return self.eval_sequences * (self.eval_part + 1)

    def trajectory(self) -> tuple[Any, ...]:
        """What cells of nested budgets share in training: all but the budget and what is evaluated."""
        later = ((name, getattr(self, name)) for name in _LATER_TRAINED)
        return _FIRST_TRAINED(self) + tuple((name, value) for name, value in later if value != _LATER[name])


_FIRST_TRAINED: Callable[[SAECell], tuple[Any, ...]] = operator.attrgetter(
    *(f.name for f in dataclasses.fields(SAECell) if f.name not in ("tokens", *_LATER))
)
"""The first version's fields, but for the budget, in one call: a plan reads a hundred thousand cells."""


_RELEASED = (
    "model",
    "layer",
    "depth",
    "k",
    "seed",
    "tokens",
    "stream",
    "context",
    "d_sae",
    "eval_sequences",
    "lm_dtype",
)


@dataclass(frozen=True, kw_only=True)
class ReleasedCell(SAECell):
    """An SAE that was trained elsewhere. Only what decides the audit is part of its identity.

    `sha256`: of config and weights, by content. `source`: where this launch reads them. `sae`: its class. `k`: of TopK,
    else 0. `seed` and `tokens` are 0; they are there for the tables of the ledger.
    """

    sha256: str
    source: str

    def identity(self) -> dict[str, Any]:
        fields = super().identity()
        later = {name: fields[name] for name in _LATER if name in fields}
        return {name: fields[name] for name in _RELEASED} | later | {"sae": self.sae, "sha256": self.sha256}

    def trajectory(self) -> tuple[Any, ...]:
        return (self.key,)

    def __post_init__(self) -> None:
        self._check_evaluation()

    @property
    def remedy(self) -> str:
        return f"the SAE of {self.source} is damaged, or was trained on other activations"


def released(cells: Sequence[SAECell]) -> list[ReleasedCell]:
    """Those of the cells that are audits: all of a plan's, or none."""
    return [cell for cell in cells if isinstance(cell, ReleasedCell)]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A preset. Every field can be changed with `--set field=value` (lists with commas)."""

    models: tuple[str, ...]  # of the table, or OWNER/NAME on the hub, a folder, FILE.gguf
    k: tuple[int, ...]
    tokens: tuple[int, ...]
    sae: tuple[str, ...] = ("topk",)  # classes to train: topk, batchtopk, matryoshka
    saes: tuple[str, ...] = ()  # of --preset released: folders, or RELEASE:ID on the hub; nothing is trained then
    depths: tuple[str, ...] = DEPTHS
    layers: tuple[int, ...] = ()  # explicit blocks instead of depths
    seeds: tuple[int, ...] = (0,)
    stream: str = "pile"
    context: int = 256  # of --preset released: 0 for what each SAE was trained on
    expansion: int = 32  # d_sae / d_model
    batch_tokens: int = 4000
    shuffle_sequences: int = 500
    lr: float = 3e-4
    schedule: str = "constant"
    warmup_steps: int = 500
    decay_steps: int = 0
    aux_coefficient: float = 1.0
    dead_after_steps: int = 1000
    eval_sequences: int = 200
    lm_dtype: str = "float32"
    drop_positions: int = 0  # first tokens of each sequence that are left out of training and evaluation
    hook: str = RESID_POST  # resid_post, resid_pre, mlp_out or attn_out, as TransformerLens names them
    blocks: str = ""  # name of the models' block list, where it is not found by its shape
    text: str = ""  # read these documents instead of `stream`: OWNER/NAME on the hub, a folder or a file
    text_column: str = ""  # column or field that holds a document's text; "": text, or the only one of strings
    max_norm_multiple: float = 0.0  # tokens longer than so many times the median norm are, too; 0: none
    h0_margin: float = 0.05  # of the verdicts, registered with the preset: CE_rec that counts as no gap, and
    h1_ratio: float = 3.0  # |ΔR²| / |ΔCE_rec| that counts as a distortion (docs/hypotheses.md)
    eval_part: int = 0  # which `eval_sequences` of the held-out ones; a search's best setting is measured on the next
    rungs: str = "all"  # "free": only what needs no pass of the language model beyond CE_rec's
    legibility: str = "off"  # "on": also sparse probes for classes of tokens; needs documents (embedded, or text=)
    information: str = "off"  # "on": the hooked layers' task-relevant dimension by mutual information, too


def sae_config(cell: SAECell, d_in: int) -> SAEConfig:
    """The trainer's configuration for a cell; raises UserError."""
    from models.sae.model import SAEConfig, matryoshka_widths  # here: a plan does without torch, which it imports

    try:
        return SAEConfig(
            d_in=d_in,
            d_sae=cell.d_sae,
            k=cell.k,
            seed=cell.seed,
            lr=cell.lr,
            schedule=cell.schedule,  # type: ignore[arg-type]
            warmup_steps=cell.warmup_steps,
            decay_steps=cell.decay_steps,
            aux_coefficient=cell.aux_coefficient,
            dead_after_steps=cell.dead_after_steps,
            kind=cell.sae,  # type: ignore[arg-type]
            matryoshka_widths=matryoshka_widths(cell.d_sae) if cell.sae == "matryoshka" else (),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
