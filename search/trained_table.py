"""Tables of trained networks: architectures with accuracies that somebody else, or an earlier study, measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from space import catalog
from space.model import Model, model_from_json, resized
from space.registry import SpecError, unknown_name
from space.spec import digest_of

STUDY = "study:"
DEFAULT_IMG_SIZE = 224
DEFAULT_NUM_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    """A network as its table names it, and the target that was measured on it: the mean of its rows if it has several."""

    id: str
    model: Model
    target: float
    num_rows: int = 1


def read_table(
    location: str,
    target: str,
    *,
    family: str,
    tracking_uri: str,
    img_size: int | None = None,
    num_classes: int | None = None,
) -> tuple[TrainedNetwork, ...]:
    """The networks of a JSONL file, or those of the study NAME that trained them, for `study:NAME`.

    A line of the file is an object with `id`, `targets` (an object of numbers) and either `spec`, the JSON of a model, or `arch`, an
    architecture that `family` reads (`Family.tables`) for 224 pixels and 1000 classes if nothing else is asked. A study's networks keep
    their own image size. A network that has several rows, or seeds, has their mean as its target. Raises SpecError naming the row that is
    wrong and what is right.
    """
    if location.startswith(STUDY):
        networks = tuple(_of_study(location.removeprefix(STUDY), target, tracking_uri, img_size))
    else:
        read = _reader(family, img_size, num_classes)
        resize = partial(resized, img_size=img_size, num_classes=num_classes)
        networks = _once_each(_of_line(where, text, target, read, resize) for where, text in _lines(Path(location)))
    values = {network.target for network in networks}
    if len(values) == 1:
        raise SpecError(f"{location}: {target} is {values.pop():g} in all {len(networks)} rows; there is nothing to rank")
    return networks


def _once_each(networks: Iterable[TrainedNetwork]) -> tuple[TrainedNetwork, ...]:
    """Every network once, with the mean target of its rows: one that counted twice would agree with itself."""
    rows: dict[str, list[TrainedNetwork]] = {}
    for network in networks:
        rows.setdefault(network.model.digest, []).append(network)
    return tuple(replace(same[0], target=sum(row.target for row in same) / len(same), num_rows=len(same)) for same in rows.values())


def digest_of_networks(networks: tuple[TrainedNetwork, ...]) -> str:
    """Names the list of networks, whatever was measured on them."""
    return digest_of([[network.id, network.model.digest] for network in networks])


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--table {path}: {error}") from error
    found = False
    for number, text in enumerate(lines, start=1):
        if text.strip():
            found = True
            yield f"{path}, line {number}", text
    if not found:
        raise SpecError(f"--table {path} has no rows; a JSON object a line is expected")


def _reader(family: str, img_size: int | None, num_classes: int | None) -> Callable[[Any], Model]:
    tables = catalog.tables()
    if family not in tables:
        raise unknown_name("family", family, tables, "--family")
    return lambda arch: tables[family](arch, img_size=img_size or DEFAULT_IMG_SIZE, num_classes=num_classes or DEFAULT_NUM_CLASSES)


def _of_line(where: str, text: str, target: str, read: Callable[[Any], Model], resize: Callable[[Model], Model]) -> TrainedNetwork:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise SpecError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, Mapping) or "id" not in row or not isinstance(row.get("targets"), Mapping):
        raise SpecError(f'{where}: an object with "id", "targets" and either "arch" or "spec" is expected')
    where = f"{where} ({row['id']})"
    if ("arch" in row) == ("spec" in row):
        raise SpecError(f'{where}: either "arch" or "spec" is expected')
    if target not in row["targets"]:
        raise SpecError(f"{where}: {unknown_name('target', target, row['targets'])}")
    value = row["targets"][target]
    if type(value) not in (int, float) or not math.isfinite(value):
        raise SpecError(f"{where}: {target} is {value!r}; a finite number is expected")
    try:
        if "arch" in row and not isinstance(row["arch"], Mapping):
            raise SpecError(f"arch is {row['arch']!r}; an object is expected")
        model = read(row["arch"]) if "arch" in row else resize(model_from_json(row["spec"]))
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from error
    return TrainedNetwork(id=str(row["id"]), model=model, target=float(value))


def _of_study(name: str, target: str, tracking_uri: str, img_size: int | None) -> Iterator[TrainedNetwork]:
    from results.mlflow_store import read_candidate, read_study

    runs = read_study(tracking_uri, name)
    measured: dict[str, list[float]] = {}
    candidates: dict[str, dict[str, Any]] = {}
    ways: dict[str, set[str]] = {}
    for run in runs.trials:
        if run.info.status == "FINISHED" and target in run.data.metrics:
            digest, candidate = run.data.tags["digest"], read_candidate(runs, run)
            measured.setdefault(digest, []).append(run.data.metrics[target])
            candidates.setdefault(digest, candidate)
            ways.setdefault(digest, set()).add(_way(run.data.tags["phase"], candidate))
    if not measured:
        known = {metric for run in runs.trials for metric in run.data.metrics if "/" not in metric}
        raise SpecError(f"--table {STUDY}{name}: {unknown_name('target', target, known)}")
    for digest, found in ways.items():
        if len(found) > 1:
            raise SpecError(
                f"--table {STUDY}{name}: network {digest[:8]} was measured in {len(found)} ways (phase, recipe, weights, settings), "
                "and a table has one; name a study that treats every network alike"
            )
    for digest, values in measured.items():
        model = resized(model_from_json(candidates[digest]["model"]), img_size=img_size)
        yield TrainedNetwork(id=candidates[digest].get("label") or digest, model=model, target=sum(values) / len(values))


def _way(phase: str, candidate: Mapping[str, Any]) -> str:
    """How a network was measured, whatever the seed."""
    recipe = {field: value for field, value in candidate.get("recipe", {}).items() if field != "seed"}
    return json.dumps([phase, recipe, candidate.get("weights"), candidate.get("settings")], sort_keys=True)
