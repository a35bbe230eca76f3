"""Which language model a cell's `model` is, and where this launch reads it from."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from models.host.specs import HOST_LMS, HostLMSpec
from sweeps.core.cells import UserError, nearest
from sweeps.core.settings import RunSettings

if TYPE_CHECKING:
    from models.host.host_lm import HookPlace
    from sweeps.sae.cells import SAECell

WEIGHTS_VARIABLE = "PLUMBLINE_WEIGHTS"


def spec_of(model: str, run: RunSettings | None = None) -> HostLMSpec:
    """Sizes and depths of a model; raises UserError for one that is unknown, unreachable or no decoder.

    Without a run (in a plan) `lm_path` is not looked at.
    """
    if model in HOST_LMS and (run is None or not run.lm_path):
        return HOST_LMS[model]  # without torch, which the rest imports
    from models.host.host_lm import LMUnavailable, UnknownModel, host_lm_spec

    where = (folder_of(model, run) or None, revision_of(model, run)) if run else (None, None)
    try:
        return host_lm_spec(model, *where)
    except UnknownModel as error:
        raise UserError(
            f"model {model!r} is not known{nearest(model, HOST_LMS)}; models: {', '.join(HOST_LMS)}, or OWNER/NAME on "
            "the hub, a local folder, FILE.gguf"
        ) from error
    except (LMUnavailable, ValueError) as error:
        raise UserError(str(error)) from error


def weights_of(run: RunSettings) -> str:
    """The folder of fetched models: the setting `weights`, else the environment's; empty where there is neither."""
    return run.weights or os.environ.get(WEIGHTS_VARIABLE, "")


def folder_of(model: str, run: RunSettings) -> str:
    """Where a model is read from instead of its own place; empty for its own."""
    if run.lm_path:
        return run.lm_path
    return weights_of(run) if model in HOST_LMS and HOST_LMS[model].origin == "file" else ""


def hub_id_of(model: str, run: RunSettings) -> str:
    """The repository on the hub that this launch reads a model from; empty for others."""
    if run.lm_path:
        return ""
    if model in HOST_LMS:
        return HOST_LMS[model].hub_id or ""
    from models.host import named

    return named.hub_id_of(model)


def pinned_commits(run: RunSettings) -> dict[str, str]:
    """{repository on the hub: the commit that this launch reads}."""
    return dict(entry.rsplit("@", 1) for entry in run.hub_commits)  # type: ignore[misc]


def revision_of(model: str, run: RunSettings) -> str | None:
    """The commit of a model on the hub; None for others, and where the launch has not asked yet."""
    return pinned_commits(run).get(hub_id_of(model, run))


def place_of(cell: SAECell) -> HookPlace:
    """The cell's hook as `models.host` has it."""
    from models.host.host_lm import HookPlace

    return HookPlace(cell.hook, cell.blocks)
