"""MLflow's run table as a leaderboard: one phase's measurements, best first, with the columns that count.

MLflow keeps a shared view of an experiment as JSON in the experiment's tag `mlflow.sharedViewState.KEY`. An address that names
KEY opens the view. The JSON holds the state of the page of MLflow 3.17, as that page writes it when a user shares a view.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from urllib.parse import quote, urlsplit

from results.paths import without_password
from results.records import COST_METRICS, Metric

VIEW_TAG = "mlflow.sharedViewState.leaderboard-"
"""The phase follows. The views that users share have keys without this beginning."""

PORT = 5000
MAX_METRICS = 10
"""Columns of metrics. A study of robustness has dozens; MLflow's menu of columns offers the others."""

NAME, CREATED = "attributes.`Run Name`", "attributes.`Created`"
LABEL = "tags.`label`"
NAME_WIDTH = 330
"""Pixels: the labels of most networks. MLflow's own width cuts them."""


def leaderboard_view(phase: str, objectives: Sequence[Metric], measured: Collection[str] = ()) -> str:
    """The JSON of the view of a phase: its trials by the first objective, those without a value last, no measurement twice.

    The columns are the name of the run, which is the network's label, the objectives, the costs of the network, other
    metrics of `measured` up to `MAX_METRICS`, and the time. The tag `label` stands at the end: runs of older studies have
    other names. Name and time are pinned to the left by MLflow, and it always shows the duration.
    """
    goals = {metric.name: metric.goal for metric in objectives}
    names = list(dict.fromkeys([*goals, *(name for name in COST_METRICS if name in measured), *measured]))
    columns = {f"metrics.`{name}`": _width(name) for name in names[: max(MAX_METRICS, len(goals))]}
    order = {"orderByKey": f"metrics.`{names[0]}`", "orderByAsc": goals[names[0]] == "minimize"} if goals else {}
    state = {
        "searchFilter": f"tags.phase = '{phase}' and tags.reused_from IS NULL",
        **order,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [CREATED, *columns, LABEL],
        # MLflow takes the widths of columns that have a place in the order, and of no others.
        "columnOrder": [NAME, CREATED, *columns, LABEL],
        "columnWidths": {NAME: NAME_WIDTH, **columns},
        "viewMaximized": True,
        "runListHidden": False,
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "compareRunCharts": [],
        "useGroupedValuesInCharts": True,
        "groupBy": None,
    }
    return json.dumps(state)


def view_address(uri: str, experiment_id: str, phase: str) -> str:
    """Where a browser shows the view; for a store without a server, on a server on this machine.

    Credentials in `uri` are left out.
    """
    parts = urlsplit(uri)
    host = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}" if _is_server(uri) else f"http://127.0.0.1:{PORT}"
    key = quote(VIEW_TAG.rpartition(".")[2] + phase, safe="")
    return f"{host}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={key}"


def how_to_browse(uri: str, addresses: Mapping[str, str]) -> list[str]:
    """Lines that say how to open the views in a browser; `addresses` by title. A store without a server needs one first.

    There are none for Databricks, whose pages are not MLflow's.
    """
    if not addresses or uri.startswith("databricks"):
        return []
    start = f", once this runs: mlflow server --backend-store-uri {shlex.quote(without_password(uri))} --port {PORT}"
    return ["in MLflow:" if _is_server(uri) else f"in MLflow{start}", *(f"  {title}: {address}" for title, address in addresses.items())]


def _is_server(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


def _width(name: str) -> int:
    """Pixels that hold the metric's name and the arrow of a sorted column."""
    return max(110, 8 * len(name) + 40)
