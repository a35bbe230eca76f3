"""The preflight's comparison, and the process it runs in: python -m models.ops._preflight_check CASE RESULT.

Shapes: B batch, T time, h query/key heads, H value heads, K, V head widths.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops._delta_rule_chunked import chunked_gated_delta

TOLERANCE = 2e-2
RESULTS = ("o", "final_state", "dq", "dk", "dv", "dg", "dbeta")

Candidate = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is tested: the shape and dtype that training will use, on the device it will use."""

    B: int
    T: int
    h: int
    H: int
    K: int
    V: int
    dtype: str
    device: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One draw of inputs; correlated keys with beta near 2 are the hardest system that the kernel must solve."""

    name: str
    seed: int
    correlated: bool = False


TRIALS = (
    Trial(name="seed 0", seed=0),
    Trial(name="seed 1", seed=1),
    Trial(name="correlated keys, beta near 2", seed=2, correlated=True),
)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Relative RMS errors by trial and result, and the first failure in words (None: all passed)."""

    errors: dict[str, dict[str, float]]
    failure: str | None


def draw_inputs(case: Case, trial: Trial) -> list[Tensor]:
    """q, k, v in the case's dtype, g and beta in float32 (as the kernel gets them), and weights of the loss.

    The correlation is chosen so that rounding alone stays well inside the tolerance: a right kernel with float16
    inputs is off by at most 1.3e-3 there, so about 1e-2 with the 8 times coarser bfloat16.
    """
    gen = torch.Generator().manual_seed(trial.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    B, T, h, H, K, V = case.B, case.T, case.h, case.H, case.K, case.V
    q, k, v, loss_weights = randn(B, T, h, K), randn(B, T, h, K), randn(B, T, H, V), randn(B, T, H, V)
    beta = 2 * torch.sigmoid(1.5 * randn(B, T, H) + (3.0 if trial.correlated else 0.0))
    rate = 16 * torch.rand(H, generator=gen)
    g = -rate * F.softplus(randn(B, T, H) - 4)
    if trial.correlated:
        k = k + randn(B, 1, h, K)
    dtype = getattr(torch, case.dtype)
    low = [x.to(case.device, dtype) for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)]
    return [*low, g.to(case.device), beta.to(case.device), loss_weights.to(case.device, dtype)]


def _evaluate(function: Candidate, inputs: list[Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    *tensors, loss_weights = [x if dtype is None else x.to(dtype) for x in inputs]
    leaves = q, k, v, g, beta = tuple(x.detach().clone().requires_grad_() for x in tensors)
    o, final_state = function(q, k, v, g, beta, None, k.shape[-1] ** -0.5)
    grads = torch.autograd.grad(o, leaves, loss_weights)
    return dict(zip(RESULTS, (o.detach(), final_state.detach(), *grads), strict=True))


def relative_rms(x: Tensor, reference: Tensor) -> float:
    """RMS of the difference over RMS of the reference, in float64; NaN where x is not finite."""
    reference = reference.double()
    return ((x.double() - reference).square().mean() / reference.square().mean()).sqrt().item()


def compare(candidate: Candidate, case: Case, tolerance: float = TOLERANCE) -> Findings:
    """Candidate against the chunked operator in float64, on equally rounded inputs, until the first failure."""
    errors: dict[str, dict[str, float]] = {}
    for trial in TRIALS:
        inputs = draw_inputs(case, trial)
        actual = _evaluate(candidate, inputs, None)
        expected = _evaluate(chunked_gated_delta, inputs, torch.float64)
        errors[trial.name] = found = {}
        for name in RESULTS:
            if actual[name].shape != expected[name].shape:
                shapes = f"{tuple(actual[name].shape)} instead of {tuple(expected[name].shape)}"
                return Findings(errors=errors, failure=f"{name} has shape {shapes} ({trial.name})")
            if not actual[name].isfinite().all():
                return Findings(errors=errors, failure=f"{name} is not finite ({trial.name})")
            found[name] = relative_rms(actual[name], expected[name])
        worst = max(found, key=lambda name: found[name])
        if not found[worst] <= tolerance:
            failure = f"relative RMS error {found[worst]:.2g} of {worst} exceeds {tolerance:g} ({trial.name})"
            return Findings(errors=errors, failure=failure)
    return Findings(errors=errors, failure=None)


def load_candidate(name: str) -> Candidate:
    """Function behind "package.module:function"."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def main() -> None:
    """Read the case and candidate from the first file, write the findings as JSON to the second."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    case = Case(**request["case"])
    result: dict[str, object]
    try:
        result = asdict(compare(load_candidate(request["candidate"]), case))
    except torch.OutOfMemoryError as error:
        result = {"errors": {}, "failure": f"out of device memory: {str(error).splitlines()[0]}", "transient": True}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
