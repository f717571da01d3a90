"""What the command line can do: list what there is, describe or evaluate one model, run a study."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from results.columns import terminal_width
from results.paths import RunPaths, place_flags, without_password
from results.records import write_json_atomically
from results.waiting import AT_ONCE_S, waiting
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
from search.named_models import named_model
from search.study import RunSettings, studies
from space import catalog
from space.component import KINDS, components
from space.edits import FIELDS, edit_from_text, places
from space.model import as_arch, require_arch
from space.registry import SpecError, unknown_name

if TYPE_CHECKING:
    from space.model import Model
    from space.weights import Weights
    from workers.data import DataSet
    from workers.evaluator import Call


def list_all(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="search/run.py list", description="What there is, one line each.").parse_args(argv)
    from search.strategy import strategies
    from workers.evaluator import evaluators
    from workers.mixings import mixings

    sections: dict[str, dict[str, str]] = {
        "studies": {name: studies.summary(name) for name in studies.names()},
        "models": {name: catalog.summary(name) for name in catalog.names()},
        "supernets": {name: supernet.summary for name, supernet in catalog.supernets().items()},
        "components": {f"{kind} {name}": components.summary(kind, name) for kind in KINDS for name in components.names(kind)},
        "evaluators": {name: evaluators.summary(name) for name in evaluators.names()},
        "mixings": {name: mixings.summary(name) for name in mixings.names()},
        "strategies": {name: strategies.summary(name) for name in strategies.names()},
    }
    width = terminal_width()
    for title, rows in sections.items():
        print(f"{title}:")
        for name, summary in rows.items():
            told = textwrap.wrap(f"{name:28} {summary}", width - 2, subsequent_indent=" " * 29, break_on_hyphens=False)
            print("\n".join(f"  {line}" for line in told))
    return 0


@waiting("importing torch and counting", first_s=AT_ONCE_S)
def describe(argv: list[str]) -> int:
    targets = ", ".join([*KINDS, *FIELDS])
    parser = argparse.ArgumentParser(
        prog="search/run.py describe",
        description="What a model is made of, and its exact counts for one image.",
        epilog=f"--set changes, in the order of the flags: {targets}. A component of the blocks is changed in all blocks of all stages.",
    )
    add_model(parser)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TARGET=VALUE",
        help="change the model: pooling=gem, feed_forward=mlp,hidden_dim=512, feed_forward.hidden_dim=512, prefix=none, depth=8",
    )
    parser.add_argument(
        "--stitches",
        nargs="?",
        const="two_way",
        metavar="SPACE",
        help="of sn_net:SMALL+LARGE: list what can be stitched; SPACE is two_way (SN-Netv2, default), paired or nearest (SN-Net)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object to FILE, which is then a MODEL for every command")
    args = parser.parse_args(argv)
    if args.stitches:
        return _list_stitches(args)
    from search.description import description
    from space.cost import cost, cost_by_part

    spec = resolve_model(args.model, args)
    explained, edits = catalog.explanation(args.model), []
    for text in args.set:
        target, changed = edit_from_text(require_arch(spec, f"--set {text}"), text, "--set")
        unchanged = ", which was so before" if changed == as_arch(spec) else ""
        told = f"--set {text}: {target.partition('.')[0]} {places(changed, target)}{unchanged}"
        edits += textwrap.wrap(told, 80, subsequent_indent="  ", break_on_hyphens=False)
        spec = changed
    total, parts = cost(spec), {path: counted._asdict() for path, counted in cost_by_part(spec).items()}
    written = {"digest": spec.digest, **total._asdict(), "parts": parts, "spec": spec.to_json()}
    if args.json:
        print(json.dumps(written))
    else:
        for lines in (explained, edits):
            if lines:
                print("\n".join(lines) + "\n")
        print("\n".join(description(spec)))
    if args.out is not None:
        _write(args.out, written)
        print(f"written to {args.out}, which is now a MODEL: search/run.py describe {shlex.quote(str(args.out))}", file=sys.stderr)
    return 0


def _list_stitches(args: argparse.Namespace) -> int:
    from search.description import stitch_rows, stitch_table
    from space.families.sn_net import LOOKS_LIKE_A_ROUTE, read_anchors

    if args.set or args.out:
        raise SpecError("--stitches lists networks; --set and --out are for one")
    family, _, names = args.model.partition(":")
    if family != "sn_net":
        raise SpecError(f"--stitches: {args.model!r} names no anchors; they are written sn_net:deit3_small+deit3_large")
    if LOOKS_LIKE_A_ROUTE.match(route := names.rpartition(":")[2]):
        raise SpecError(f"--stitches lists the routes over some anchors; {args.model!r} has the route {route!r} already")
    anchors = read_anchors(names)
    rows = stitch_rows(anchors, args.stitches)
    print(json.dumps({"stitches": rows}) if args.json else "\n".join(stitch_table(anchors, rows)))
    return 0


def _write(path: Path, data: dict[str, Any]) -> None:
    if not path.parent.is_dir():
        raise SpecError(f"--out {path}: there is no folder {path.parent}")
    if path.exists():
        try:
            catalog.resolve(str(path))
        except SpecError as error:
            raise SpecError(f"--out {path} exists and is no model ({error}); it is left as it is") from error
    try:
        write_json_atomically(path, data)
    except (OSError, ValueError) as error:
        raise SpecError(f"--out {path}: {error}") from error


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
    with waiting(f"preparing {args.model} and its data", first_s=AT_ONCE_S):
        from results.records import Failure
        from search.description import call_in_words
        from search.progress import EvaluationProgress
        from space.cost import cost
        from space.search_space import Candidate
        from workers.evaluate import Job, evaluate
        from workers.resources import resources_of

        settings = run_settings("evaluate", args)
        calls = settings.calls()
        _refuse_settings_of_others(settings, [call.name for call in calls])
        if args.gpus > 0:
            import torch

            if not torch.cuda.is_available():
                raise SpecError(f"--gpus {args.gpus:g}: there is no CUDA device on this machine; leave --gpus out to measure on the CPU")
        spec = _fitted_model(args, calls)
        cost(spec)  # what cannot be built ends here, and not as a failed measurement
        recipe = parse_recipe(args.recipe, args.seed)
        weights = _checked_weights(settings, calls, spec, args.model)
        for call in calls:
            call.check(spec, recipe, weights)
        # With --json, standard output is one object.
        told = sys.stderr if args.json else sys.stdout
        if weights is not None:
            print(weights.summary, file=told)
        for doubt in recipe.doubts if recipe else ():
            print(f"warning: {doubt}", file=sys.stderr)
        dataset = _told_dataset(args.data, calls, spec, told)
    progress = EvaluationProgress(calls, recipe)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            trial=0,
            candidate=Candidate(model=spec, recipe=recipe, weights=weights),
            calls=calls,
            seed=args.seed,
            data=args.data,
            # It is the name of a stored measurement, and this one is only shown: the bytes of the data need not be read for it.
            data_fingerprint="",
            workdir=args.workdir or Path(folder),
            num_threads=args.threads,
            resources=resources_of(calls, gpus=args.gpus),
        )
        outcome = evaluate(job, progress.report, dataset, progress.around)
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
        "warnings": list(outcome.warnings),
        "num_threads": outcome.num_threads,
        "evaluators": {call.name: call.to_json()["settings"] for call in calls},
        **({"weights": weights.to_json()} if weights else {}),
    }
    if args.json:
        print(json.dumps(result))
    else:
        threads = "1 thread" if outcome.num_threads == 1 else f"{outcome.num_threads} threads"
        print(f"digest {spec.digest}   {outcome.device}, {threads}, seed {outcome.seed}, {outcome.elapsed_s:.1f} s")
        for call in calls:
            for line in call_in_words(call, outcome.values):
                print(line)
    return 0


def _fitted_model(args: argparse.Namespace, calls: tuple[Call, ...]) -> Model:
    """The model that is named, with the classes that `classes_of` decides."""
    from search.preparation import classes_of
    from space.model import resized

    num_classes = classes_of(calls, args.data, args.num_classes)
    return resized(resolve_model(args.model, args), img_size=args.img_size, num_classes=num_classes)


def _checked_weights(settings: RunSettings, calls: tuple[Call, ...], model: Model, name: str) -> Weights | None:
    if settings.weights is None:
        return None
    if all(call.evaluator.weights == "ignored" for call in calls):
        from workers.evaluator import evaluators

        starting = ", ".join(name for name in evaluators.names() if evaluators.get(name).weights != "ignored")
        given = ", ".join(call.name for call in calls)
        raise SpecError(f"--weights {settings.weights}: none of --evaluators {given} starts from weights; {starting} would")
    return settings.weights_for(model, name)


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
    paths = RunPaths(settings.runs)
    optuna, mlflow = settings.storage or str(paths.journal), settings.tracking_uri or paths.mlflow_uri
    print(f"results in {paths.root} (Optuna: {without_password(optuna)}; MLflow: {without_password(mlflow)})", flush=True)
    with waiting("importing what a study needs"):
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
    """The spec that `text` names, with the leaderboard entries of the store that the flags name."""
    return named_model(text, args.tracking_uri or RunPaths(runs_folder(args.runs)).mlflow_uri)


def _refuse_settings_of_others(settings: RunSettings, names: list[str]) -> None:
    for name in settings.evaluator_settings:
        if name not in names:
            raise unknown_name("evaluator", name, names, "--set")


def _command() -> str:
    return shlex.join(["search/run.py", *map(without_password, sys.argv[1:])])


COMMANDS = {"list": list_all, "describe": describe, "evaluate": evaluate_model}
"""What stands in the place of a study's name."""
