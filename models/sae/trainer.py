"""Training SAEs (TopK, BatchTopK, Matryoshka): one SAE (`SparseTrainer`), and many on one stream (`SAEBank`).

Shape suffixes: B tokens, D = d_in, M = d_sae, k active features.

Everything a sweep needs is importable from here. The mathematics is in `model` and `engines`, the numba kernels in
`kernels`, the on-disk format in `saelens`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from models.sae.cost import bank_bytes, step_flops
from models.sae.engines import (
    PARAMETERS,
    Backend,
    DenseEngine,
    Engine,
    Losses,
    Number,
    Scratch,
    TorchEngine,
    on_host,
    screen_dtype,
)
from models.sae.jumprelu import THRESHOLD_RATE, JumpReLUSAE
from models.sae.model import SAEConfig, TopKSAE
from models.sae.numba_engine import NumbaEngine
from models.sae.probe import faster_backend
from models.sae.screen import encoder

__all__ = [
    "JumpReLUSAE",
    "SAEBank",
    "SAEConfig",
    "SparseTrainer",
    "StepStats",
    "TopKSAE",
    "bank_bytes",
    "encoder",
    "step_flops",
]

BackendChoice = Literal["auto", "numba", "torch", "dense"]
# fields that states written before there were several kinds of SAE do not name
_LATER_FIELDS = {"kind": "topk", "matryoshka_widths": ()}


@dataclass(frozen=True)
class StepStats:
    """The numbers of one training step. Losses are sums over d_in and means over tokens, as in SAELens."""

    step: int  # steps done, this one included
    loss: float  # mse + inner + aux
    mse: float
    aux: float
    grad_norm: float  # before clipping
    l0: float  # active features (h > 0) per token
    dead: int  # dead features before this step
    rescreened: int  # rows whose support was settled in float32 over all features
    lr: float
    inner: float = 0.0  # Matryoshka: the squared errors of the inner reconstructions


def check_finite(x_BD: torch.Tensor, name: str, step: int) -> None:
    """Raise ValueError, naming the place, if x holds NaN or inf."""
    if not bool(torch.isfinite(x_BD).all()):
        bad = int((~torch.isfinite(x_BD)).sum())
        raise ValueError(
            f"{name}: {bad} of {x_BD.numel()} activations are NaN or inf at step {step}; no weight was changed; "
            "check the language model's dtype and the input shard"
        )


class SparseTrainer:
    """Trains one SAE: sparse gradients, global-norm clip, dense Adam, AuxK for dead features.

    - `backend`: "numba" (CPU), "torch" (any device), "dense" (autograd over all features, the reference), or
      "auto": torch on an accelerator; on a CPU the faster of numba and torch in a short measured probe. The choice
      is `trainer.backend` and part of the state, so that a resumed run goes on with the same one.
    - `n_threads`: threads of the numba kernels (default: torch's). They never change the result of a kernel.
    - `name`: what error messages call the activations ("layer 3", say).
    - `scratch`: buffers to share with other trainers of this device that take turns with this one.

    With a constant rate, the state after b steps of a longer run is the run of b steps, bit for bit. With "wsd",
    `branch()` at `config.branch_step(budget)` gives the copy that decays to that budget.
    """

    def __init__(
        self,
        config: SAEConfig,
        *,
        backend: BackendChoice = "auto",
        n_threads: int | None = None,
        device: torch.device | str = "cpu",
        name: str = "activations",
        scratch: Scratch | None = None,
    ) -> None:
        self.config, self.name = config, name
        self.n_threads = n_threads or torch.get_num_threads()
        self.scratch = scratch or Scratch(device)
        self.sae = TopKSAE.from_config(config, device)
        self.step_count = 0
        self.decay_from: int | None = None
        self.threshold = 0.0
        parameters = {name: getattr(self.sae, name) for name in PARAMETERS}
        self._exp_avg = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self._exp_avg_sq = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self._since_fired = torch.zeros(config.d_sae, dtype=torch.int32, device=self.device)
        self._n_dead: int | None = 0  # None: not counted
        self._engine = self._make_engine(self._resolve(backend))

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.sae.W_enc.device

    @property
    def backend(self) -> Backend:
        """The backend in use: "numba", "torch" or "dense"."""
        return self._engine.name

    @property
    def dead(self) -> torch.Tensor:
        """Bool [d_sae]: features that have not fired for more than `dead_after_steps` steps."""
        return self._since_fired > self.config.dead_after_steps

    def _resolve(self, backend: BackendChoice) -> Backend:
        if backend == "numba" and self.device.type != "cpu":
            raise ValueError(f"backend='numba' runs on CPUs, the device is {self.device}; choose 'torch'")
        if backend not in ("auto", "numba", "torch", "dense"):
            raise ValueError(f"backend={backend!r} is unknown; choose auto, numba, torch or dense")
        if backend != "auto":
            return backend
        return "torch" if self.device.type != "cpu" else faster_backend(self.config, self.n_threads)

    def _make_engine(self, backend: Backend) -> Engine:
        parts = (self.sae, self.config, self._exp_avg, self._exp_avg_sq, self.scratch)
        if backend == "dense":
            return DenseEngine(*parts)
        if backend == "numba":
            return NumbaEngine(*parts, n_threads=self.n_threads)
        return TorchEngine(*parts, screen_dtype=screen_dtype(self.device))

    def lr_at(self, step: int) -> float:
        """Learning rate of the step after `step` finished ones.

        Linear warm-up over `warmup_steps`, then constant; in a decay branch times 1 − i/decay_steps for its i-th
        step (SAELens' linear decay). Raises RuntimeError beyond the branch's end.
        """
        lr = self.config.lr * min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        if self.decay_from is not None:
            into = step - self.decay_from
            if into >= self.config.decay_steps:
                raise RuntimeError(
                    f"decay branch is finished after {self.config.decay_steps} steps; train the trunk on"
                )
            lr *= 1 - into / self.config.decay_steps
        return lr

    def step(self, x_BD: torch.Tensor) -> StepStats:
        """One training step on the activations x [B, d_in] (converted to float32 on the trainer's device).

        Raises ValueError, before any weight changes, when x has another width or holds NaN or inf, and
        FloatingPointError when the gradient is not finite.
        """
        self._check_shape(x_BD)
        if self._engine.waits:
            check_finite(x_BD, self.name, self.step_count)
        return self._step(x_BD, checked=self._engine.waits)

    def _check_shape(self, x_BD: torch.Tensor) -> None:
        if x_BD.ndim != 2 or x_BD.shape[1] != self.config.d_in or len(x_BD) == 0:
            raise ValueError(
                f"{self.name}: activations of shape {tuple(x_BD.shape)} are not [B, d_in={self.config.d_in}]"
            )

    @torch.no_grad()
    def _step(self, x_BD: torch.Tensor, *, checked: bool) -> StepStats:
        """A step; `checked`: x is known to be finite."""
        lr = self.lr_at(self.step_count)
        x = x_BD.detach().to(self.device, torch.float32).contiguous()
        if self._n_dead is None:
            self._n_dead = int(self.dead.sum())
        n_dead, dead = self._n_dead, None
        if n_dead and self.config.aux_coefficient > 0:
            dead = torch.nonzero_static(self.dead, size=n_dead).flatten()
        finite: Number = 1.0 if checked else torch.isfinite(x).all()
        losses, grad_norm, since_fired, next_dead, finite = self._gradients(x, dead, finite)
        if not finite:
            check_finite(x, self.name, self.step_count)
        if not grad_norm < float("inf"):
            raise FloatingPointError(
                f"{self.name}: gradient norm is {grad_norm} at step {self.step_count}; no weight was changed; "
                f"lower lr={self.config.lr:g} or check the activations' scale"
            )
        self.step_count += 1
        self._engine.update(lr, self.step_count, grad_norm)
        least = float(losses.least)
        if least == least:  # NaN: nothing was kept
            self.threshold = (1 - THRESHOLD_RATE) * self.threshold + THRESHOLD_RATE * least
        self._since_fired.copy_(since_fired)
        self._n_dead = next_dead
        mse, aux, inner = float(losses.mse), float(losses.aux), float(losses.inner)
        return StepStats(
            step=self.step_count,
            loss=mse + inner + aux,
            mse=mse,
            aux=aux,
            grad_norm=grad_norm,
            l0=float(losses.active) / len(x),
            dead=n_dead,
            rescreened=int(losses.rescreened),
            lr=lr,
            inner=inner,
        )

    def _gradients(
        self, x_BD: torch.Tensor, dead: torch.Tensor | None, finite: Number
    ) -> tuple[Losses, float, torch.Tensor, int, bool]:
        """Gradients of a batch: the losses and the norm as numbers, `since_fired` after this step, how many features
        are dead then, and `finite` as a bool. On an accelerator the host waits for all of them at once."""
        while True:
            losses = self._engine.gradients(x_BD, dead)
            since_fired = (self._since_fired + 1).masked_fill_(losses.fired_M, 0)
            next_dead = (since_fired > self.config.dead_after_steps).sum()
            norm, count, good, mse, aux, active, rescreened, inner, least, doubtful = on_host(
                self._engine.grad_norm(), next_dead, finite, losses.mse, losses.aux, losses.active, losses.rescreened,
                losses.inner, losses.least, losses.doubtful,
            )  # fmt: skip
            losses = Losses(mse, aux, active, losses.fired_M, rescreened, inner, least, doubtful)
            if not good or self._engine.settled(int(doubtful)):
                return losses, norm, since_fired, int(count), bool(good)

    def inference(self) -> TopKSAE | JumpReLUSAE:
        """The SAE as it is evaluated and published: decoder norms folded, BatchTopK with its threshold.

        Without rescaling a TopK SAE keeps its norms, which take part in the selection.
        """
        if self.config.kind != "topk":
            return JumpReLUSAE.of_batch_topk(self.sae, self.threshold)
        return self.sae.folded() if self.config.rescale_acts_by_decoder_norm else self.sae

    def branch(self) -> SparseTrainer:
        """A copy that decays linearly to zero over the next `decay_steps` steps; this trunk stays as it is.

        Raises ValueError for a constant schedule, before the end of warm-up, and on a branch.
        """
        if self.config.schedule != "wsd":
            raise ValueError("schedule='constant' has no decay branch: its state at a budget is that budget's run")
        if self.decay_from is not None:
            raise ValueError("this trainer is a decay branch already; branch from the trunk")
        if self.step_count < self.config.warmup_steps:
            raise ValueError(f"step {self.step_count} lies in the warm-up of {self.config.warmup_steps}; branch later")
        twin = SparseTrainer(
            self.config,
            backend=self.backend,
            n_threads=self.n_threads,
            device=self.device,
            name=self.name,
            scratch=self.scratch,
        )
        twin.load_state_dict(self.state_dict())
        twin.decay_from = self.step_count
        return twin

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, flat, of tensors and plain values (`torch.save` it).

        The tensors are the live ones: write them out, or copy them, before the next step.
        """
        state: dict[str, Any] = {
            "config": asdict(self.config),
            "backend": self.backend,
            "step": self.step_count,
            "decay_from": self.decay_from,
            "since_fired": self._since_fired,
        }
        if self.config.kind != "topk":
            state["threshold"] = self.threshold
        for name in PARAMETERS:
            state[name] = getattr(self.sae, name).detach()
            state[f"exp_avg.{name}"] = self._exp_avg[name]
            state[f"exp_avg_sq.{name}"] = self._exp_avg_sq[name]
        state.update({f"derived.{name}": value for name, value in self._engine.derived_state().items()})
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, with the backend that wrote it.

        On the same machine and number of threads the run goes on bit for bit. Raises ValueError when the state is
        of another configuration.
        """
        mine, theirs = asdict(self.config), _LATER_FIELDS | dict(state["config"])
        for name in ("betas", "matryoshka_widths"):
            theirs[name] = tuple(theirs[name])
        different = sorted(key for key in mine if mine[key] != theirs.get(key))
        if different or set(theirs) != set(mine):
            found = ", ".join(f"{key}={theirs.get(key)!r} (here {mine[key]!r})" for key in different)
            raise ValueError(f"state is of another SAE: {found or 'unknown fields'}; start again or restore its config")
        for name in PARAMETERS:
            getattr(self.sae, name).copy_(state[name])
            self._exp_avg[name].copy_(state[f"exp_avg.{name}"])
            self._exp_avg_sq[name].copy_(state[f"exp_avg_sq.{name}"])
        self._since_fired.copy_(state["since_fired"])
        self._n_dead = None
        self.step_count = state["step"]
        self.decay_from = state["decay_from"]
        self.threshold = float(state.get("threshold", 0.0))
        backend = self._resolve(state["backend"])
        if backend != self.backend:
            self._engine = self._make_engine(backend)
        prefix = "derived."
        self._engine.load_derived_state(
            {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        )


class SAEBank:
    """Many SAEs on one stream of activations: one batch of each layer trains every cell of that layer.

    `cells` maps a key to (layer, SAEConfig). The cells take turns on shared scratch buffers, and a cell's result is
    the one it has alone, bit for bit. `backend="auto"` is settled once, for the largest cell.
    """

    def __init__(
        self,
        cells: Mapping[Hashable, tuple[int, SAEConfig]],
        *,
        backend: BackendChoice = "auto",
        n_threads: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.scratch = Scratch(device)
        self.layers: dict[Hashable, int] = {}
        self.trainers: dict[Hashable, SparseTrainer] = {}
        largest_first = sorted(cells.items(), key=lambda item: -item[1][1].d_sae * item[1][1].k)
        for key, (layer, config) in largest_first:
            trainer = SparseTrainer(
                config,
                backend=backend,
                n_threads=n_threads,
                device=device,
                name=f"layer {layer}",
                scratch=self.scratch,
            )
            backend = trainer.backend
            self.layers[key], self.trainers[key] = layer, trainer
        self.layers = {key: self.layers[key] for key in cells}
        self.trainers = {key: self.trainers[key] for key in cells}

    def pop(self, key: Hashable) -> SparseTrainer:
        """Take a cell out of the bank and return its trainer."""
        del self.layers[key]
        return self.trainers.pop(key)

    def step(self, acts_BD: Mapping[int, torch.Tensor]) -> dict[Hashable, StepStats]:
        """One step of every cell on the batch of its layer, `{layer: x [B, d_in]}`; the numbers by key.

        Raises ValueError before any weight of any cell changes when a layer is missing, has another width, or holds
        NaN or inf.
        """
        layers = sorted(set(self.layers.values()))
        for layer in layers:
            if layer not in acts_BD:
                raise ValueError(f"layer {layer} is missing from the batch, which has layers {sorted(acts_BD)}")
        finite = on_host(*(torch.isfinite(acts_BD[layer]).all() for layer in layers))
        for layer in (layer for layer, good in zip(layers, finite, strict=True) if not good):
            steps = max(t.step_count for key, t in self.trainers.items() if self.layers[key] == layer)
            check_finite(acts_BD[layer], f"layer {layer}", steps)
        for key, trainer in self.trainers.items():
            trainer._check_shape(acts_BD[self.layers[key]])
        return {key: trainer._step(acts_BD[self.layers[key]], checked=True) for key, trainer in self.trainers.items()}
