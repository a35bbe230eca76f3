"""What MLflow opens on: the runs page in training mode, a grid's cells in flat rows, the charts of its question.

MLflow keeps views that are shared as tags of the experiment, and an address names one by its key. The form of such a
tag is MLflow's own affair and changes with its versions, so it is written for the version that it was read from
(`_VERSION`: its experiment page, mlflow/server/js) and for no other; elsewhere the address carries a plain search.
"""

from __future__ import annotations

import base64
import json
import time
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlencode

from sweeps.core.cells import digest
from sweeps.launch.mlflow_store import GRID, TAG_LENGTH, quoted

SUMMARY = "summary.json"  # of a report: {name: number or word}, which the launch's run shows as metrics and tags
_VERSION = "3.17."
_KIND = "mlflow.experimentKind"
_TRAINING = "custom_model_development"  # without it the experiment opens in the mode for traces of agents
_SHARED = "mlflow.sharedViewState."
_LAUNCH_FIRST = "tags.`plumbline.kind`"  # "launch" comes before "cell" in descending order; any order but that by
# time also keeps MLflow from nesting the cells in a closed row of their launch
_RUNS = 100  # that a chart shows
_WIDTH = 105  # of a column, in pixels
_SECTION = {"isReordered": True, "deleted": False, "isGenerated": False, "columns": 2, "cardHeight": 330}


@dataclass(frozen=True)
class Chart:
    """One chart of the first view. Names of metrics are those of MLflow, `/NAME` parts included.

    kind: `scatter` shows y against x, one dot per cell, `bar` one bar per cell, `line` a curve over steps per cell.
    x: of a scatter. x_param: whether x is a field of the cell instead of a metric.
    """

    title: str
    kind: Literal["scatter", "bar", "line"]
    y: str
    x: str = ""
    x_param: bool = False


@dataclass(frozen=True)
class View:
    """What the first view shows. params, metrics: columns of the table, in this order. charts: in this order."""

    params: Sequence[str] = ()
    metrics: Sequence[str] = ()
    charts: Sequence[Chart] = ()

    def of_search(self, fields: Sequence[str], columns: Sequence[str]) -> View:
        """The same for a search: its fields, and what it optimises against each of them, come first.

        A column may be a name alone, `final_val_nll`, of which MLflow knows `final_val_nll/ema`: the sweep's own view
        begins with the one that is meant.
        """
        columns = [self._spelled(column) for column in columns]
        charts = [Chart(f"{columns[0]} by {name}", "scatter", columns[0], name, x_param=True) for name in fields]
        params, metrics = dict.fromkeys([*fields, *self.params]), dict.fromkeys([*columns, *self.metrics])
        return View(list(params), list(metrics), [*charts, *self.charts])

    def _spelled(self, column: str) -> str:
        if column in self.metrics:
            return column
        return next((name for name in self.metrics if name.startswith(f"{column}/")), column)


def search_of(grid: str) -> str:
    """MLflow's search for the runs of a grid: its cells and its launches."""
    return f"tags.`{GRID}` LIKE {quoted(f'%{grid}%')}"


def runs_address(pages: str, experiment: str, grid: str, view: str) -> str:
    """Address of the runs page: with the shared view of this key, or with a search where the key is empty."""
    mode = {"workflowType": "machine_learning"}
    if view:
        what = {"compareRunsMode": "CHART", "viewStateShareKey": view}
    else:
        what = {"searchFilter": search_of(grid), "orderByKey": _LAUNCH_FIRST, "orderByAsc": "false"}
    return f"{pages}/#/experiments/{experiment}/runs?{urlencode(mode | what)}"


def share(client: Any, uri: str, experiment: str, view: View, grid: str, title: str) -> str:
    """Make the experiment open in training mode and share the grid's view; returns the view's key.

    The key is empty where there is no grid, and where MLflow is of another version than the view is written for.
    Writes nothing that is there already, and leaves a kind alone that somebody chose.
    """
    tags = client.get_experiment(experiment).tags
    if _KIND not in tags:
        client.set_experiment_tag(experiment, _KIND, _TRAINING)
    if not grid or not server_version(uri).startswith(_VERSION):
        return ""
    state = json.dumps(_state(view, grid), separators=(",", ":"))
    key = f"plumbline-{grid}-{digest(state)[:4]}"
    if f"{_SHARED}{key}" not in tags:
        now = int(time.time() * 1000)
        text = "deflate;" + base64.b64encode(zlib.compress(state.encode(), 9)).decode()
        named = {"name": f"{title} ({grid})", "createdAt": now, "updatedAt": now, "state": text}
        value = json.dumps(named)
        if len(value) > TAG_LENGTH:
            return ""
        client.set_experiment_tag(experiment, f"{_SHARED}{key}", value)
    return key


def server_version(uri: str) -> str:
    """Version of the MLflow that shows the store's pages: the server's, or the installed one for a file."""
    import mlflow

    if not uri.startswith("http"):
        return mlflow.__version__
    from mlflow.tracking._tracking_service.utils import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    answer = http_request(get_default_host_creds(uri), "/version", "GET", timeout=10, max_retries=0)
    return answer.text.strip() if answer.status_code == 200 else ""


def _state(view: View, grid: str) -> dict[str, Any]:
    """What MLflow's page keeps of itself: search, order, columns, sections of charts."""
    section, all_metrics, system = (_name(grid, part) for part in ("question", "metrics", "system"))
    sections = [
        ("The question", section, True),
        ("Model metrics", all_metrics, False),
        ("System metrics", system, False),
    ]
    metrics, params = (
        [f"{kind}.`{n}`" for n in names] for kind, names in (("metrics", view.metrics), ("params", view.params))
    )
    return {
        "searchFilter": search_of(grid),
        "orderByKey": _LAUNCH_FIRST,
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [*metrics, *params],
        "columnOrder": [*metrics, *params],
        "columnWidths": {name: _WIDTH for name in (*metrics, *params)},
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,
        "compareRunCharts": [_card(chart, section, f"{grid}{i}") for i, chart in enumerate(view.charts)],
        "compareRunSections": [
            _SECTION | {"uuid": name, "name": title, "display": shown} for title, name, shown in sections
        ],
    }


def _card(chart: Chart, section: str, name: str) -> dict[str, Any]:
    """A chart as MLflow's page describes it."""
    common = {
        "uuid": _name(name, chart.title),
        "type": chart.kind.upper(),
        "metricSectionId": section,
        "displayName": chart.title,
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": _RUNS,
    }
    if chart.kind == "scatter":
        x_kind = "PARAM" if chart.x_param else "METRIC"
        return common | {"xaxis": {"key": chart.x, "type": x_kind}, "yaxis": {"key": chart.y, "type": "METRIC"}}
    if chart.kind == "bar":
        return common | {"metricKey": chart.y}
    lines = {"lineSmoothness": 0, "scaleType": "linear", "xAxisScaleType": "linear", "xAxisKey": "step"}
    return common | lines | {"metricKey": chart.y, "selectedMetricKeys": [chart.y], "useGlobalXaxisKey": True}


def _name(*parts: str) -> str:
    """A UUID that is the same for the same parts, so that a view is written once."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "/".join(parts)))
