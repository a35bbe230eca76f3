"""The preflight's comparison, and the process it runs in: python -m models.ops._preflight_check CASE RESULT."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.ops._preflight_cases import CASES, Candidate, KernelCase


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Relative RMS errors by trial and result, and the first failure in words (None: all passed)."""

    errors: dict[str, dict[str, float]]
    failure: str | None


def _evaluate(
    case: KernelCase, function: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    *tensors, loss_weights = [x if dtype is None else x.to(dtype) for x in inputs]
    leaves = tuple(x.detach().clone().requires_grad_() for x in tensors)
    out, final_state = function(leaves)
    grads = torch.autograd.grad(out, leaves, loss_weights)
    return dict(zip(case.results, (out.detach(), final_state.detach(), *grads), strict=True))


def relative_rms(x: Tensor, reference: Tensor) -> float:
    """RMS of the difference over RMS of the reference, in float64; NaN where x is not finite."""
    reference = reference.double()
    return ((x.double() - reference).square().mean() / reference.square().mean()).sqrt().item()


def compare(candidate: Candidate, case: KernelCase, tolerance: float | None = None) -> Findings:
    """Candidate against the reference in float64, on equally rounded inputs, until the first failure.

    tolerance: the case's when None.
    """
    tolerance = case.tolerance if tolerance is None else tolerance
    errors: dict[str, dict[str, float]] = {}
    for trial in case.trials:
        inputs = case.draw(trial)
        actual = _evaluate(case, lambda leaves: case.call(candidate, leaves), inputs, None)
        expected = _evaluate(case, case.reference, inputs, torch.float64)
        errors[trial.name] = found = {}
        for name in case.results:
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
    case = CASES[request["operator"]](**request["case"])
    result: dict[str, object]
    try:
        result = asdict(compare(load_candidate(request["candidate"]), case))
    except torch.OutOfMemoryError as error:
        result = {"errors": {}, "failure": f"out of device memory: {str(error).splitlines()[0]}", "transient": True}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
