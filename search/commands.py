"""What the command line can do: list what there is, describe or evaluate one model, run a study."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from results.paths import RunPaths, place_flags, without_password
from search.arguments import (
    add_measuring_flags,
    add_model,
    add_network_flags,
    parse_recipe,
    parse_study,
    positive_int,
    ray_address,
    run_settings,
    runs_folder,
)
from search.interruption import Interruption
from search.study import RunSettings, studies
from space import catalog
from space.component import KINDS, components
from space.registry import SpecError, unknown_name

if TYPE_CHECKING:
    from space.model import Model
    from workers.data import DataSet
    from workers.evaluator import Call

MIN_DIGITS = 4
"""Of a digest, to be taken for one."""


def list_all(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="search/run.py list", description="What there is, one line each.").parse_args(argv)
    from search.strategy import strategies
    from workers.evaluator import evaluators
    from workers.mixings import mixings

    sections: dict[str, dict[str, str]] = {
        "studies": {name: studies.summary(name) for name in studies.names()},
        "models": {name: catalog.summary(name) for name in catalog.names()},
        "components": {f"{kind} {name}": components.summary(kind, name) for kind in KINDS for name in components.names(kind)},
        "evaluators": {name: evaluators.summary(name) for name in evaluators.names()},
        "mixings": {name: mixings.summary(name) for name in mixings.names()},
        "strategies": {name: strategies.summary(name) for name in strategies.names()},
    }
    for title, rows in sections.items():
        print(f"{title}:")
        for name, summary in rows.items():
            print(f"  {name:28} {summary}")
    return 0


def describe(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="search/run.py describe", description="Exact counts of one model, for one image.")
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args(argv)
    from space.cost import cost, cost_by_part
    from space.model import depth_of

    spec = resolve_model(args.model, args)
    total, parts = cost(spec), {path: counted._asdict() for path, counted in cost_by_part(spec).items()}
    if args.json:
        print(json.dumps({"digest": spec.digest, **total._asdict(), "parts": parts, "spec": spec.to_json()}))
        return 0
    print(f"digest {spec.digest}   {spec.img_size} px, depth {depth_of(spec)}, {spec.num_classes} classes")
    print(f"{'part':40} {'params':>14} {'macs':>18} {'fvcore_macs':>18}")
    for path, counted in {**parts, "total": total._asdict()}.items():
        print(f"{path:40} {counted['params']:>14,} {counted['macs']:>18,} {counted['fvcore_macs']:>18,}")
    return 0


def evaluate_model(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="search/run.py evaluate", description="Measure one model now, without a study.")
    add_model(parser)
    parser.add_argument("--evaluators", required=True, metavar="A,B", help="names, separated by commas")
    parser.add_argument("--recipe", default="", metavar="FIELD=VALUE,...", help="how it is trained: epochs=20,batch_size=64,mixing=cutmix")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="where weights and artifacts go; default: nowhere that lasts")
    parser.add_argument("--threads", type=positive_int, default=1, help="CPU threads (default 1); they decide a score's last bits")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_network_flags(parser)
    add_measuring_flags(parser)
    args = parser.parse_args(argv)
    from results.records import Failure
    from space.search_space import Candidate
    from workers.evaluate import Job, evaluate
    from workers.resources import resources_of

    settings = run_settings("evaluate", args)
    calls = tuple(settings.call(name.strip()) for name in args.evaluators.split(","))
    _refuse_settings_of_others(settings, [call.name for call in calls])
    if args.gpus > 0:
        import torch

        if not torch.cuda.is_available():
            raise SpecError(f"--gpus {args.gpus:g}: there is no CUDA device on this machine; leave --gpus out to measure on the CPU")
    spec = _fitted_model(args, calls)
    recipe = parse_recipe(args.recipe, args.seed)
    for call in calls:
        call.evaluator.check(spec, recipe, call.settings)
    # With --json, standard output is one object.
    told = sys.stderr if args.json else sys.stdout
    for doubt in recipe.doubts if recipe else ():
        print(f"warning: {doubt}", file=sys.stderr)
    dataset = _told_dataset(args.data, calls, spec, told)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            trial=0,
            candidate=Candidate(model=spec, recipe=recipe),
            calls=calls,
            seed=args.seed,
            data=args.data,
            # It is the name of a stored measurement, and this one is only shown: the bytes of the data need not be read for it.
            data_fingerprint="",
            workdir=args.workdir or Path(folder),
            num_threads=args.threads,
            resources=resources_of(calls, gpus=args.gpus),
        )
        outcome = evaluate(job, dataset=dataset)
    if isinstance(outcome, Failure):
        print(outcome.traceback, file=sys.stderr) if outcome.kind == "error" else None
        print(f"failed ({outcome.kind}): {outcome.message}", file=sys.stderr)
        return 1
    for warning in outcome.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    result: dict[str, Any] = {
        "digest": spec.digest,
        "values": dict(outcome.values),
        "elapsed_s": outcome.elapsed_s,
        "device": outcome.device,
        "versions": dict(outcome.versions),
        "seed": outcome.seed,
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(f"digest {spec.digest}   {outcome.device}, seed {outcome.seed}, {outcome.elapsed_s:.1f} s")
        for name, value in outcome.values.items():
            print(f"  {name:32} {value:.6g}")
    return 0


def _fitted_model(args: argparse.Namespace, calls: tuple[Call, ...]) -> Model:
    """The model that is named, with the classes that `classes_of` decides."""
    from search.preparation import classes_of
    from space.model import resized

    num_classes = classes_of(calls, args.data, args.num_classes)
    return resized(resolve_model(args.model, args), img_size=args.img_size, num_classes=num_classes)


def _told_dataset(data: str, calls: tuple[Call, ...], model: Model, told: TextIO) -> DataSet | None:
    """The data set that the evaluators need, None if they need none; what they read is told first."""
    from workers.data import load_dataset, summarize

    if any(call.evaluator.needs_dataset for call in calls):
        dataset = load_dataset(data, img_size=model.img_size)
        print(dataset.summary, file=told)
        return dataset
    if any(call.evaluator.uses_data for call in calls):
        print(summarize(data, (model.img_size,), with_parts=False), file=told)
    return None


def run_a_study(study: str, argv: list[str]) -> int:
    settings, args = parse_study(study, argv)
    interruption = Interruption()
    interruption.install()
    from search.service import PhaseStopped, run_study

    try:
        run_study(
            settings,
            fresh=args.fresh,
            max_workers=args.workers,
            ray_address=ray_address(args.ray_address),
            command=_command(),
            as_json=args.json,
            interruption=interruption,
            place=place_flags(settings.runs, settings.tracking_uri and without_password(settings.tracking_uri), os.environ),
        )
    except PhaseStopped as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def resolve_model(text: str, args: argparse.Namespace) -> Model:
    """The spec that `text` names: of the catalogue, a method's string, a file, or a leaderboard entry by its digest."""
    is_digest = re.fullmatch(f"[0-9a-f]{{{MIN_DIGITS},16}}", text) and text not in catalog.names() and not Path(text).is_file()
    if is_digest:
        from results.mlflow_store import check_tracking, find_candidate
        from space.model import model_from_json

        uri = args.tracking_uri or RunPaths(runs_folder(args.runs)).mlflow_uri
        check_tracking(uri)
        candidate = find_candidate(uri, text)
        if candidate is None:
            raise SpecError(f"no leaderboard entry has the digest {text!r} in {uri}; --runs or --tracking-uri name another store")
        return model_from_json(candidate["model"])
    return catalog.resolve(text)


def _refuse_settings_of_others(settings: RunSettings, names: list[str]) -> None:
    for name in settings.evaluator_settings:
        if name not in names:
            raise unknown_name("evaluator", name, names, "--set")


def _command() -> str:
    return shlex.join(["search/run.py", *map(without_password, sys.argv[1:])])


COMMANDS = {"list": list_all, "describe": describe, "evaluate": evaluate_model}
"""What stands in the place of a study's name."""
