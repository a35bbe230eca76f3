"""The rungs of the ladder that look at the language model, for one SAE: first order, Fisher forms, KL, attention plans.

`SharedPass` is what one forward and one (or two) backward passes of the unpatched model give to all SAEs;
`CellRungs` follows one SAE's reconstructions through the held-out text. Costs are measured as they arise, in forward
passes of the whole model over the same tokens.

Shape suffixes: S sequences, B sequences of a chunk, T context, D = d_model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

from analysis.sae.columns import RUNG_SUMS
from analysis.sae.rungs import deviation, rung_numbers
from models.host.attention_plans import AttentionPlans, NoPlans
from models.host.host_lm import HostLM, Unpatched
from models.host.predictions import NoForwardMode, Predictions, jvp
from sweeps.core.cells import Row

FREE = "free"  # of `cells.RUNGS`: no passes but those of CE_rec and one backward
_SPANS = ("backward", "drawn", "fisher", "patched", "plans")
_SHARED = ("backward", "drawn")
_TIMED = 2  # sequences whose plain forward pass gives the unit of cost


class Clock:
    """Seconds of compute by name: CPU-seconds on a CPU, so that other work on the machine does not count."""

    def __init__(self, device: str) -> None:
        self._gpu = device.startswith("cuda")
        self.seconds: dict[str, float] = {}

    def _now(self) -> float:
        if self._gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        began = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - began


@dataclass
class SharedPass:
    """What all SAEs share: predictions by chunk, scores of drawn labels by layer, and what the passes took.

    whole: whether the rungs that take passes of their own are asked for. Seconds over all sequences: forward_seconds of
    a plain forward pass of the whole model; backward_seconds of the pass from the loss to the lowest hooked layer;
    drawn_seconds of that from drawn labels, with the drawing.
    """

    lm: HostLM
    logits_dtype: torch.dtype
    whole: bool
    clock: Clock
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    drawn_seconds: float = 0.0
    predictions: dict[int, Predictions] = field(default_factory=dict)  # first sequence of a chunk → its predictions
    scores: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)  # (layer, first sequence) → s_BTD

    def run(self, rows: slice, tokens_BT: torch.Tensor, layers: list[int], also: list[int]) -> Unpatched:
        """The unpatched pass of one chunk; labels are drawn by the chunk's place alone."""
        draws = torch.Generator().manual_seed(rows.start) if self.whole else None
        found = self.lm.unpatched(tokens_BT, layers, also=also, logits_dtype=self.logits_dtype, draws=draws)
        self.predictions[rows.start] = Predictions(
            self.lm.head, tokens_BT, found.hidden_BTD, found.pull_BTD, found.loss_B
        )
        for layer, s_BTD in found.scores.items():
            self.scores[layer, rows.start] = s_BTD
        return found

    def time_passes(self, tokens_ST: torch.Tensor, layers: list[int]) -> None:
        """Measure the unit of cost, and a backward pass, on a few sequences."""
        few_BT, last = tokens_ST[:_TIMED], self.lm.n_layers - 1
        for name in ("warming", "forward"):
            with self.clock.span(name):
                a_BTD = self.lm.activations(few_BT, [last])[last]
                self.lm.patched_loss(a_BTD, last, few_BT, logits_dtype=self.logits_dtype)
        with self.clock.span("both"):
            self.lm.unpatched(few_BT, layers, logits_dtype=self.logits_dtype)
        if self.whole:
            with self.clock.span("drawn"):
                draws = torch.Generator().manual_seed(0)
                self.lm.unpatched(few_BT, layers, logits_dtype=self.logits_dtype, draws=draws)
        scale = len(tokens_ST) / len(few_BT)
        self.forward_seconds = self.clock.seconds["forward"] * scale
        both = self.clock.seconds["both"]
        self.backward_seconds = max(0.0, both * scale - self.forward_seconds)
        self.drawn_seconds = max(0.0, (self.clock.seconds.get("drawn", both) - both) * scale)


class CellRungs:
    """One SAE's rungs; call `patched_loss` for each chunk, in any order."""

    def __init__(self, shared: SharedPass, layer: int, n_sequences: int, device: str) -> None:
        self.shared, self.lm, self.layer = shared, shared.lm, layer
        self.clock = Clock(device)
        self.reasons: dict[str, str] = {}
        self._values = {name: np.full(n_sequences, np.nan) for name in RUNG_SUMS}
        self._layers: dict[int, list[float]] = {}
        self._cost_B: list[torch.Tensor] = []
        self._fisher_sum = self._expected_sum = 0.0
        implementation = str(getattr(self.lm.model.config, "_attn_implementation", ""))
        self._plans = AttentionPlans(implementation, lambda: self.clock.span("plans"))
        if not shared.whole:
            self.reasons = dict.fromkeys(("fisher", "plans", "drawn"), "not asked for (rungs=free)")

    def patched_loss(
        self, rows: slice, a_BTD: torch.Tensor, a_hat_BTD: torch.Tensor, g_BTD: torch.Tensor
    ) -> torch.Tensor:
        """The patched model's mean loss of each sequence, [B], with every rung measured on the way."""
        known = self.shared.predictions[rows.start]
        n = known.tokens_BT.shape[1] - 1
        delta_BTD = a_hat_BTD - a_BTD
        self._keep("first_order", rows, (g_BTD.double() * delta_BTD).sum(dim=(1, 2)) / n)
        tail = self.lm.tail(self.layer, known.tokens_BT)
        if self.shared.whole:
            self._fisher(rows, known, a_BTD, delta_BTD)
            self._drawn(rows, delta_BTD, n)
        with torch.no_grad(), self.clock.span("patched"):
            a_hat_BTD = a_hat_BTD.to(self.lm.dtype)
            hidden_BTD = tail(a_hat_BTD) if "plans" in self.reasons else self._with_plans(rows, tail, a_hat_BTD)
            loss_B = self.lm.mean_loss(hidden_BTD, known.tokens_BT, logits_dtype=self.shared.logits_dtype)
            self._keep("kl", rows, known.kl(hidden_BTD, loss_B))
        return loss_B

    def _keep(self, name: str, rows: slice, value_B: torch.Tensor) -> None:
        self._values[name][rows] = value_B.double().cpu().numpy()

    def _fisher(self, rows: slice, known: Predictions, a_BTD: torch.Tensor, delta_BTD: torch.Tensor) -> None:
        """The Fisher forms, and on the same pass the unpatched attention."""
        tail = self.lm.tail(self.layer, known.tokens_BT)
        a_BTD, moved_BTD = a_BTD.to(self.lm.dtype), delta_BTD.to(self.lm.dtype)
        if "fisher" not in self.reasons:
            try:
                with self.clock.span("fisher"):
                    with self._reference():
                        _, tangent_BTD = jvp(tail, a_BTD, moved_BTD)
                    variance_B, second_B = known.fisher(tangent_BTD, self.shared.logits_dtype)
                self._keep("fisher", rows, variance_B)
                self._keep("fisher_diag", rows, second_B)
                self._fisher_sum += float(variance_B.sum()) * (known.tokens_BT.shape[1] - 1)
                return
            except NoForwardMode as error:
                self.reasons["fisher"] = str(error)
            except NoPlans as error:
                self.reasons["plans"] = str(error)
                self._fisher(rows, known, a_BTD, delta_BTD)
                return
        if "plans" not in self.reasons:  # the patched pass needs a reference even so
            try:
                with self.clock.span("plans"), torch.no_grad(), self._plans.reference():
                    tail(a_BTD)
            except NoPlans as error:
                self.reasons["plans"] = str(error)

    @contextmanager
    def _reference(self) -> Iterator[None]:
        if "plans" in self.reasons:
            yield
            return
        with self._plans.reference():
            yield

    def _drawn(self, rows: slice, delta_BTD: torch.Tensor, n: int) -> None:
        s_BTD = self.shared.scores[self.layer, rows.start].double()
        self._keep("fisher_sampled", rows, (s_BTD * delta_BTD).sum(dim=(1, 2)).square() / n)
        norms_BT = delta_BTD.double().square().sum(-1) * s_BTD.square().sum(-1)
        self._expected_sum += float(norms_BT.sum()) / s_BTD.shape[-1]

    def _with_plans(
        self, rows: slice, tail: Callable[[torch.Tensor], torch.Tensor], a_hat_BTD: torch.Tensor
    ) -> torch.Tensor:
        try:
            with self._plans.distances() as found:
                hidden_BTD = tail(a_hat_BTD)
        except NoPlans as error:
            self.reasons["plans"] = str(error)
            return tail(a_hat_BTD)
        self._keep("attention_plan", rows, torch.stack([d for d, _ in found.values()]).sum(0))
        self._cost_B.append(torch.stack([c for _, c in found.values()]).sum(0))
        for layer, (divergence_B, _) in found.items():
            self._layers.setdefault(layer, []).extend(divergence_B.tolist())
        return hidden_BTD

    def table(self) -> dict[str, np.ndarray]:
        """RUNG_SUMS, one entry per sequence."""
        return self._values

    def numbers(self, sequences: pd.DataFrame) -> dict[str, float]:
        """RUNG_COLUMNS; `sequences` holds n_tokens and the losses."""
        found = rung_numbers(sequences.assign(**self._values))
        found["fisher_deviation"] = deviation(self._fisher_sum, self._expected_sum) if self._fisher_sum else np.nan
        found["attention_cost"] = float(torch.cat(self._cost_B).mean()) if self._cost_B else np.nan
        return found

    def layer_rows(self) -> list[Row]:
        """The attention plans' distance of every later layer."""
        return [
            Row("attention_plan_of_layer", float(np.mean(values)), "nats", {"plan_layer": layer})
            for layer, values in sorted(self._layers.items())
        ]

    def costs(self) -> pd.DataFrame:
        """Columns rung, passes, shared, reason: see `analysis.sae.rungs.merged_costs`."""
        unit = max(self.shared.forward_seconds, 1e-9)
        seconds = dict(self.clock.seconds)
        seconds["patched"] -= seconds.get("plans", 0.0)
        seconds["backward"] = self.shared.backward_seconds
        if "drawn" not in self.reasons:
            seconds["drawn"] = self.shared.drawn_seconds
        rows = [
            (name, seconds.get(name, np.nan) / unit, name in _SHARED, self.reasons.get(name, "")) for name in _SPANS
        ]
        return pd.DataFrame(rows, columns=["rung", "passes", "shared", "reason"])
