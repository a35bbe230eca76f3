"""The one training loop of the audio-token language models.

A `Trainer` is everything that a step changes: model, optimizer, averaged weights, random state, step. `train` drives
it to its last step, measuring and saving on the way. Batches are a function of the step, so a restart needs no
iterator state and continues to the same bits (same number of threads, device and processes).

Several processes hold the same state. Each takes its share of the clips of a batch, and gradients are those of the
mean over all real targets of the whole batch, so their number changes a trajectory by rounding alone.

Shapes: B clips, K codebooks, T delayed steps.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data.split import identity_hash
from models.codec.cost import names_by_group
from models.codec.model import CodecLM, config_facts
from models.codec.text import Texts
from models.cpu.adam import AdamW
from models.cpu.allocator import keep_freed_memory
from models.cpu.bfloat16 import multiplies_bfloat16
from sweeps.core.world import World
from sweeps.launch.stop import PackStopped

_RUNNING = 0.95  # decay of the running means that anomalies are judged by
_NOT_DECAYED = ("A_log", "dt_bias", ".D")
_SAVE_PAUSE = 20  # times the last checkpoint's own duration before the next: at most 5% of the time goes there


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What decides a trajectory. Learning rate: linear warm-up, then cosine from `lr` to `lr_end` at `steps`.

    micro_batch: clips whose activations a process holds at once (0: all its share); gradients add up to the batch's.
    max_loss_jump: nats by which a loss after the warm-up may exceed its running mean. spike_factor: a gradient norm
    this many times its running mean is counted as a spike, and laid to the parameter group that grew most.
    """

    steps: int
    lr: float
    lr_end: float
    warmup_steps: int
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    label_smoothing: float = 0.1
    precision: str = "float32"
    micro_batch: int = 0
    max_loss_jump: float = 2.0
    spike_factor: float = 5.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} trains nothing; choose steps >= 1")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must lie in 0..steps-1 (steps={self.steps})")
        if not 0 <= self.lr_end <= self.lr or self.lr <= 0:
            raise ValueError(f"lr_end={self.lr_end} must lie in 0..lr and lr={self.lr} be positive")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision={self.precision!r} is not known; choose float32 or bfloat16")

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr_end + 0.5 * (self.lr - self.lr_end) * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Batch:
    """inputs and targets [B, K, T] of next-column prediction; `real_tokens` of the targets are not padding.

    texts: one per clip, for a model with text conditioning.
    """

    inputs_BKT: Tensor
    targets_BKT: Tensor
    real_tokens: int
    texts: Texts | None = None


@dataclass(frozen=True)
class StepStats:
    """One step: training loss (smoothed, nats per token), gradient norm before clipping, the same by group."""

    step: int
    loss: float
    grad_norm: float
    group_norms: dict[str, float]
    stop: bool = False  # some process was asked to stop


class _Loss(nn.Module):
    """The loss as a module's forward, which is what DistributedDataParallel can watch."""

    def __init__(self, model: CodecLM, label_smoothing: float) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, inputs_BKT: Tensor, targets_BKT: Tensor, texts: Texts | None) -> Tensor:
        return self.model.loss(inputs_BKT, targets_BKT, texts, label_smoothing=self.label_smoothing).loss


class AnomalyError(ValueError):
    """Training cannot go on: a loss or gradient that is not finite, or a loss that jumped. `batch` caused it."""

    def __init__(self, text: str, step: int, batch: Batch) -> None:
        super().__init__(text)
        self.step, self.batch = step, batch


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bfloat16 autocast on the device, or nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


@dataclass
class Trainer:
    """Model, optimizer and averaged weights at one step of a trajectory.

    maker: name and version of what trains, kept in checkpoints and required of them.
    seed: of dropout; each clip's masks follow from it, the step and the clip's place in the batch alone.
    best: step and value of the best measurement of the averaged weights so far.
    """

    model: CodecLM
    config: TrainConfig
    world: World = field(default_factory=World)
    maker: str = ""
    seed: int = 0
    step_count: int = 0
    real_tokens: int = 0
    running: dict[str, float] = field(default_factory=dict)
    spikes: dict[str, int] = field(default_factory=dict)
    curve: list[tuple[str, int, float]] = field(default_factory=list)  # metric, step, value
    best: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        named = dict(self.model.named_parameters())
        self.device = next(iter(named.values())).device
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.config.precision == "bfloat16" and not multiplies_bfloat16(self.device):
            warnings.warn(
                "precision=bfloat16 on a processor without bfloat16 instructions makes float32 products of rounded "
                "numbers and takes longer than float32; choose precision=float32",
                stacklevel=3,
            )
        self.groups: dict[str, list[Tensor]] = {}
        for name, group in names_by_group(self.model):
            self.groups.setdefault(group, []).append(named[name])
        decayed = [p for n, p in named.items() if p.dim() > 1 and not n.endswith(_NOT_DECAYED)]
        chosen = {id(p) for p in decayed}
        rest = [p for p in named.values() if id(p) not in chosen]
        self.optimizer = AdamW(
            [
                {"params": decayed, "weight_decay": self.config.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=self.config.lr,
            betas=self.config.betas,
            fused=True,
        )
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.config.ema_decay))
        self._loss: nn.Module = _Loss(self.model, self.config.label_smoothing)
        if self.world.size > 1:
            # unused parameters: memory caching has some in batches shorter than a segment. It also keeps the buckets
            # as they are at the first step, so that sums have the same order after a restart.
            self._loss = DistributedDataParallel(
                self._loss,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                find_unused_parameters=True,
            )

    @property
    def ema(self) -> CodecLM:
        """The model with exponentially averaged weights."""
        module = self.average.module
        assert isinstance(module, CodecLM)
        return module

    def step(self, batch: Batch, *, stop: bool = False) -> StepStats:
        """One optimizer step on a batch, the same in all processes; each takes its share of the clips.

        Raises AnomalyError in all processes, before any weight changes.
        """
        c = self.config
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss, stops = self.world.sum([self._accumulate(batch), float(stop)])
        self._check_loss(loss, batch)
        squares = {
            name: torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]) ** 2
            for name, parameters in self.groups.items()
        }
        total = torch.stack(list(squares.values())).sum().sqrt()
        # all numbers at once, before the update: on a GPU the host waits for each request
        norm, *parts = torch.stack([total, *squares.values()]).tolist()
        if not math.isfinite(norm):
            wrong = [name for name, square in zip(squares, parts, strict=True) if not math.isfinite(square)]
            raise self._anomaly(f"gradient norm {norm} in {', '.join(wrong)}", batch)
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), c.grad_clip, total)
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr_at(self.step_count)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.step_count += 1
        self.real_tokens += batch.real_tokens
        group_norms = {name: square**0.5 for name, square in zip(squares, parts, strict=True)}
        stats = StepStats(self.step_count, loss, norm, group_norms, stops > 0)
        self._watch(stats)
        return stats

    def _accumulate(self, batch: Batch) -> float:
        """Gradients of the mean loss over the whole batch's targets, a micro-batch at a time.

        Returns this process's part of that loss. A process without a clip takes part with a clip of weight 0.
        """
        pad, world, loss = self.model.config.pad, self.world, torch.zeros((), device=self.device)
        total = (batch.targets_BKT != pad).sum()
        idle = world.rank >= len(batch.targets_BKT)
        share = slice(0, 1) if idle else slice(world.rank, None, world.size)
        inputs_BKT, targets_BKT = batch.inputs_BKT[share], batch.targets_BKT[share]
        seeds = [identity_hash(f"{self.seed} {self.step_count} {clip}", salt="dropout") for clip in
                 range(len(batch.targets_BKT))[share]]  # fmt: skip
        texts = batch.texts and batch.texts.rows(share)
        size = self.config.micro_batch or len(targets_BKT)
        starts = range(0, len(targets_BKT), size)
        for start in starts:
            some = slice(start, start + size)
            inputs_bKT, targets_bKT = inputs_BKT[some], targets_BKT[some]
            self.model.seed_dropout(seeds[some])
            with self._apart(last=start == starts[-1]):
                with autocast(self.device, self.config.precision):
                    mean = self._loss(inputs_bKT, targets_bKT, texts and texts.rows(some))
                part = mean * (0 if idle else (targets_bKT != pad).sum() / total)
                (part * world.size).backward()  # the processes' gradients are averaged
            loss += part.detach()
        self.model.seed_dropout(())
        return float(loss)

    def _apart(self, *, last: bool) -> AbstractContextManager[Any]:
        """Keeps gradients in this process until the last micro-batch."""
        return self._loss.no_sync() if isinstance(self._loss, DistributedDataParallel) and not last else nullcontext()

    def _anomaly(self, what: str, batch: Batch) -> AnomalyError:
        text = f"{what} at step {self.step_count + 1}; choose a lower lr (now {self.config.lr:g}) or a longer warm-up"
        return AnomalyError(text, self.step_count + 1, batch)

    def _check_loss(self, loss: float, batch: Batch) -> None:
        mean = self.running.get("loss")
        if not math.isfinite(loss):
            raise self._anomaly(f"loss {loss}", batch)
        jump = self.config.max_loss_jump
        if mean is not None and self.step_count > self.config.warmup_steps and loss > mean + jump:
            raise self._anomaly(f"loss {loss:.3f} exceeds its running mean {mean:.3f} by more than {jump:g}", batch)

    def _watch(self, stats: StepStats) -> None:
        """Update the running means and count a gradient spike for the group that grew most."""
        now = {"loss": stats.loss, "": stats.grad_norm, **stats.group_norms}
        settled = self.step_count > max(20, self.config.warmup_steps)
        if settled and stats.grad_norm > self.config.spike_factor * self.running[""]:
            growth = {n: v / max(self.running[n], 1e-12) for n, v in stats.group_norms.items()}
            worst = max(growth, key=lambda name: growth[name])
            self.spikes[worst] = self.spikes.get(worst, 0) + 1
        for name, value in now.items():
            self.running[name] = _RUNNING * self.running.get(name, value) + (1 - _RUNNING) * value

    def state(self) -> dict[str, Any]:
        """All that a restart needs, as tensors, numbers and texts."""
        return {
            "maker": self.maker,
            "architecture": self._architecture_text(),
            "config": self._config_text(),
            "processes": self.world.size,
            "step": self.step_count,
            "real_tokens": self.real_tokens,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "watch": json.dumps(
                {"running": self.running, "spikes": self.spikes, "curve": self.curve, "best": self.best}
            ),
        }

    def _architecture_text(self) -> str:
        return json.dumps(config_facts(self.model.config))

    def _config_text(self) -> str:
        """The training configuration without what changes no more than rounding."""
        return json.dumps({name: value for name, value in asdict(self.config).items() if name != "micro_batch"})

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`, whatever number of processes wrote it.

        Raises ValueError for the state of another program version, architecture or training configuration.
        """
        if state.get("maker") != self.maker:
            raise ValueError(
                f"the checkpoint is of {state.get('maker') or 'an unnamed version'}, this is {self.maker}; remove it "
                "(_work/ of the ledger) to train again"
            )
        for what, mine in (("architecture", self._architecture_text()), ("config", self._config_text())):
            if state[what] != mine:
                name = "training configuration" if what == "config" else what
                raise ValueError(f"the checkpoint is of another {name}: {_difference(state[what], mine)}")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        for kept in self.optimizer.state.values():  # which keeps the tensors that it is given, here a mapped file's
            kept.update({name: value.clone() for name, value in kept.items() if isinstance(value, Tensor)})
        torch.set_rng_state(state["rng"].cpu())
        if state["rng_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"].cpu(), self.device)
        watch = json.loads(state["watch"])
        self.running, self.spikes = watch["running"], watch["spikes"]
        self.curve = [(str(m), int(s), float(v)) for m, s, v in watch["curve"]]
        self.best = (int(watch["best"][0]), float(watch["best"][1])) if watch["best"] else None
        self.step_count, self.real_tokens = int(state["step"]), int(state["real_tokens"])


def _difference(theirs: str, mine: str) -> str:
    """The first few fields in which two JSON objects differ, as `name=theirs (here mine)`."""
    a, b = json.loads(theirs), json.loads(mine)
    names = [name for name in (*a, *(n for n in b if n not in a)) if a.get(name) != b.get(name)]
    return ", ".join(f"{name}={a.get(name)} (here {b.get(name)})" for name in names[:3])


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often a loop measures and saves.

    eval_every: steps between measurements. measure_end: the last step of a call is measured, too.
    save_seconds: seconds between saves; longer where a save takes more than a twentieth of that.
    save_steps: steps between saves (0: never for that reason).
    """

    eval_every: int
    save_seconds: float = math.inf
    save_steps: int = 0
    measure_end: bool = True


class Owner:
    """What a training loop asks of the one whose model it trains; the defaults measure and keep nothing."""

    def evaluate(self, model: CodecLM) -> dict[str, float]:
        """A model's numbers by metric name; called on the raw and on the averaged weights, in all processes."""
        return {}

    def save(self, trainer: Trainer) -> None:
        """Keeps the trainer's state; called in the first process alone."""

    def keep_best(self, trainer: Trainer) -> None:
        """Called in the first process when the averaged weights' `val_nll` is the lowest so far."""

    def report(self, trainer: Trainer, stats: StepStats, rate: float) -> None:
        """Progress after each step; `rate` is in real tokens per second."""

    def stopping(self) -> bool:
        """Whether this process was asked to stop."""
        return False


def train(
    trainer: Trainer, batch_at: Callable[[int], Batch], owner: Owner, pace: Pace, until: int | None = None
) -> float:
    """Train to step `until` (the last by default).

    Returns real (unpadded) tokens per second of training, evaluations and saves left out; NaN without a step.

    State is saved when it is due, at an `until` before the last step, and where work stops; not at the last step.

    Args:
        trainer: at step 0, or restored.
        batch_at: the batch of step s (from 0), on the model's device.
    Raises:
        AnomalyError: from `Trainer.step`.
        PackStopped: in all processes, after the state was saved, when one of them was asked to stop.
    """
    busy, tokens = 0.0, 0
    last = trainer.config.steps
    end = last if until is None else until
    saves = _Saves(trainer, owner, pace)
    while trainer.step_count < end:
        batch = batch_at(trainer.step_count)
        began = time.monotonic()
        stats = trainer.step(batch, stop=owner.stopping())
        busy += time.monotonic() - began
        tokens += batch.real_tokens
        if trainer.step_count % pace.eval_every == 0 or (trainer.step_count == end and pace.measure_end):
            _measure(trainer, stats, owner)
        owner.report(trainer, stats, tokens / max(busy, 1e-9))
        if stats.stop:
            saves.save()
            raise PackStopped(f"stopped at step {trainer.step_count}; its checkpoint is kept")
        if trainer.step_count < last and (saves.due() or trainer.step_count == end):
            saves.save()
    return tokens / busy if busy else math.nan


class _Saves:
    """When the state was last saved, and how long that took."""

    def __init__(self, trainer: Trainer, owner: Owner, pace: Pace) -> None:
        self.trainer, self.owner, self.pace = trainer, owner, pace
        self.last, self.took = time.monotonic(), 0.0

    def due(self) -> bool:
        by_step = self.pace.save_steps > 0 and self.trainer.step_count % self.pace.save_steps == 0
        return by_step or time.monotonic() - self.last > max(self.pace.save_seconds, _SAVE_PAUSE * self.took)

    def save(self) -> None:
        began = time.monotonic()
        if self.trainer.world.first:
            self.owner.save(self.trainer)
        self.last = time.monotonic()
        self.took = self.last - began


def _measure(trainer: Trainer, stats: StepStats, owner: Owner) -> None:
    points = {"train_loss": stats.loss, "grad_norm": stats.grad_norm}
    points |= {f"grad_norm/{group}": norm for group, norm in stats.group_norms.items()}
    for weights, model in (("raw", trainer.model), ("ema", trainer.ema)):
        points |= {f"{metric}/{weights}": value for metric, value in owner.evaluate(model).items()}
    trainer.curve += [(metric, stats.step, value) for metric, value in points.items()]
    value = points.get("val_nll/ema", math.nan)
    if value < (trainer.best[1] if trainer.best else math.inf):
        trainer.best = (stats.step, value)
        if trainer.world.first:
            owner.keep_best(trainer)
