"""MLflow's runs of a sweep's cells."""

from __future__ import annotations

from typing import Any


def runs_of_cells(uri: str, sweep: str) -> list[Any]:
    """The runs of all cells of a sweep, as MLflow's client returns them."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(f"plumbline/{sweep}")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], "tags.`plumbline.kind` = 'cell'"))
