#!/usr/bin/env python3
"""The command line of vitscale: run a study, list what there is, describe or evaluate one model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from results.paths import RunPaths, default_runs, without_password
from search.budget import Budget
from search.interruption import Interruption
from search.study import RunSettings, studies
from space import catalog
from space.component import KINDS, components
from space.recipe import Recipe
from space.registry import SpecError, unknown_name

IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the environment of a job's driver."""

USAGE = """\
usage: search/run.py STUDY [flags]                        run or resume a study (--help lists the flags)
       search/run.py list                                 studies, models, components, evaluators, strategies
       search/run.py describe MODEL [--json]              digest, parameters and MACs, total and per part
       search/run.py evaluate MODEL --evaluators A,B ...  measure one model now, without a study

MODEL is a catalogue name (deit_small), a method's string (as_vit:8,2,3|4,1,2|4,1,4|4,1,6|32), the path of a spec's
JSON, or the digest of a leaderboard entry.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command in `argv`; returns the exit status: 2 for a user's mistake, 1 when the work itself failed."""
    argv = sys.argv[1:] if argv is None else argv
    # Ray and MLflow report usage over the network unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # timm still uses torch.jit, which torch 2.15 comments on at every import.
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE + f"\nstudies: {', '.join(studies.names())}")
        return 0 if argv else 2
    commands = {"list": _list, "describe": _describe, "evaluate": _evaluate}
    try:
        if argv[0] in commands:
            return commands[argv[0]](argv[1:])
        if argv[0] not in studies.names():
            raise unknown_name("study or command", argv[0], [*studies.names(), *commands])
        return _study(argv[0], argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; pointing stdout elsewhere keeps the interpreter's exit quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _list(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="search/run.py list", description="What there is, one line each.").parse_args(argv)
    from search.strategy import strategies
    from workers.evaluator import evaluators

    sections: dict[str, dict[str, str]] = {
        "studies": {name: studies.summary(name) for name in studies.names()},
        "models": {name: catalog.summary(name) for name in catalog.names()},
        "components": {f"{kind} {name}": components.summary(kind, name) for kind in KINDS for name in components.names(kind)},
        "evaluators": {name: evaluators.summary(name) for name in evaluators.names()},
        "strategies": {name: strategies.summary(name) for name in strategies.names()},
    }
    for title, rows in sections.items():
        print(f"{title}:")
        for name, summary in rows.items():
            print(f"  {name:28} {summary}")
    return 0


def _describe(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="search/run.py describe", description="Exact counts of one model, for one image.")
    _add_model(parser)
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


def _evaluate(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="search/run.py evaluate", description="Measure one model now, without a study.")
    _add_model(parser)
    parser.add_argument("--evaluators", required=True, metavar="A,B", help="names, separated by commas")
    parser.add_argument("--recipe", default="", metavar="FIELD=VALUE,...", help="how it is trained: epochs=20,batch_size=64,mixing=cutmix")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="where weights and artifacts go; default: nowhere that lasts")
    parser.add_argument("--threads", type=_positive_int, default=1, help="CPU threads (default 1); they decide a score's last bits")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_measuring_flags(parser)
    args = parser.parse_args(argv)
    from results.records import Failure
    from space.search_space import Candidate
    from workers.data import check_source
    from workers.evaluate import Job, evaluate
    from workers.resources import resources_of

    settings = _run_settings("evaluate", args)
    calls = tuple(settings.call(name.strip()) for name in args.evaluators.split(","))
    _refuse_settings_of_others(settings, [call.name for call in calls])
    if any(call.evaluator.uses_data for call in calls):
        check_source(args.data)
    spec = resolve_model(args.model, args)
    recipe = parse_recipe(args.recipe, args.seed)
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
        outcome = evaluate(job)
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


def _study(study: str, argv: list[str]) -> int:
    settings, args = parse_study(study, argv)
    interruption = Interruption()
    interruption.install()
    from search.service import PhaseStopped, run_study

    try:
        run_study(
            settings,
            fresh=args.fresh,
            max_workers=args.workers,
            ray_address=_ray_address(args.ray_address),
            command=_command(),
            interruption=interruption,
        )
    except PhaseStopped as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_study(study: str, argv: list[str]) -> tuple[RunSettings, argparse.Namespace]:
    """The run-level settings in the flags of `search/run.py STUDY`, and the flags themselves."""
    parser = argparse.ArgumentParser(
        prog=f"search/run.py {study}",
        description=f"{studies.summary(study)} Running the same command again resumes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--name", metavar="NAME", help="name of the study in Optuna and MLflow, if not that of the method")
    parser.add_argument("--trials", type=_positive_int, metavar="N", help="trials to complete in the phases that count them")
    parser.add_argument("--img-size", type=_positive_int, metavar="PX", help="image size of the reported networks")
    parser.add_argument("--proxy-img-size", type=_positive_int, metavar="PX", help="image size at which networks are scored")
    bound = "of a metric that is known without measuring, e.g. gmacs=1.3; repeatable"
    parser.add_argument("--max", action="append", default=[], metavar="METRIC=VALUE", help=f"budget: upper bound {bound}")
    parser.add_argument("--min", action="append", default=[], metavar="METRIC=VALUE", help=f"budget: lower bound {bound}")
    parser.add_argument("--max-params-m", type=_positive_float, metavar="M", help="the same as --max params_m=M, in millions")
    parser.add_argument("--max-gmacs", type=_positive_float, metavar="G", help="the same as --max gmacs=G, in billions of multiply-adds")
    parser.add_argument("--strategy", metavar="NAME", help="what proposes trials; see search/run.py list")
    _add_measuring_flags(parser)
    parser.add_argument("--time-limit-s", type=_positive_float, metavar="S", help="a trial that takes longer is cancelled and failed")
    parser.add_argument("--workers", type=_positive_int, metavar="N", help="most trials in flight; default: what the cluster holds")
    parser.add_argument("--ray-address", metavar="A", help="'local', 'auto' or HOST:PORT; default: the job's cluster, else local")
    parser.add_argument(
        "--runs", metavar="DIR", help="folder of all results; default: $VITSCALE_RUNS, else ./runs, in a Ray job ~/vitscale/runs"
    )
    parser.add_argument("--storage", metavar="URL", help="Optuna storage: journal file, database URL or grpc://HOST:PORT")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow tracking server or store")
    parser.add_argument(
        "--processes", type=_positive_int, default=1, metavar="N", help="processes that train one network together, --gpus each"
    )
    parser.add_argument("--fresh", action="store_true", help="set the old study aside under a dated name and begin anew")
    options = studies.get(study).options
    _add_options(parser, options)
    args = parser.parse_args(argv)
    return dataclasses.replace(_run_settings(study, args), budget=_budget(args), options=_options(options, args)), args


def _budget(args: argparse.Namespace) -> Budget:
    aliases = [(f"--max-{name.replace('_', '-')}", name, getattr(args, f"max_{name}")) for name in ("params_m", "gmacs")]
    at_most = [(f"{flag} {value:g}", name, value) for flag, name, value in aliases if value is not None]
    return Budget(at_most=_bounds([*_assigned("--max", args.max), *at_most]), at_least=_bounds(_assigned("--min", args.min)))


def _assigned(flag: str, assignments: list[str]) -> list[tuple[str, str, float]]:
    """The flag as it was given, the metric and the bound of every METRIC=VALUE."""
    assigned: list[tuple[str, str, float]] = []
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        try:
            if not (name and equals):
                raise ValueError
            assigned.append((f"{flag} {assignment}", name.strip(), float(value)))
        except ValueError:
            raise SpecError(f"{flag} {assignment!r} is malformed; METRIC=VALUE with a number is expected, e.g. gmacs=1.3") from None
    return assigned


def _bounds(given: list[tuple[str, str, float]]) -> dict[str, float]:
    bounds: dict[str, tuple[str, float]] = {}
    for flag, name, value in given:
        first, bound = bounds.setdefault(name, (flag, value))
        if bound != value:
            raise SpecError(f"{first} and {flag} contradict each other; give one of them")
    return {name: bound for name, (_, bound) in bounds.items()}


def _add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """A flag for each field of a study's own options; one that is not given stays out of the namespace."""
    if not dataclasses.fields(options):
        return
    group = parser.add_argument_group("of this study")
    hints = get_type_hints(options)
    kinds = {int: {"type": _any_int, "metavar": "N"}, float: {"type": _any_float, "metavar": "X"}, bool: {"action": "store_true"}}
    for field in dataclasses.fields(options):
        default = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
        shown = f" (default: {default})" if default not in ("", False) else ""
        kind = kinds.get(hints[field.name], {"metavar": "NAME"} if hints[field.name] is str else {"action": "append", "metavar": "NAME"})
        text = field.metadata.get("help", "") + shown
        group.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text.replace("%", "%%"), **kind)


def _options(options: type, args: argparse.Namespace) -> Any:
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(options) if hasattr(args, field.name)}
    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def resolve_model(text: str, args: argparse.Namespace):
    """The spec that `text` names: of the catalogue, a method's string, a file, or a leaderboard entry by its digest."""
    if len(text) >= 6 and all(letter in "0123456789abcdef" for letter in text) and text not in catalog.names():
        from results.mlflow_store import check_tracking, find_candidate
        from space.model import model_from_json

        uri = args.tracking_uri or RunPaths(_runs_folder(args.runs)).mlflow_uri
        check_tracking(uri)
        candidate = find_candidate(uri, text)
        if candidate is None:
            raise SpecError(f"no leaderboard entry has the digest {text!r} in {uri}; --runs or --tracking-uri name another store")
        return model_from_json(candidate["model"])
    return catalog.resolve(text)


def parse_recipe(text: str, seed: int) -> Recipe | None:
    """The recipe in `field=value,...`, trained under `seed`; None for an empty text. Grids are separated by `/`."""
    if not text:
        return None
    hints = get_type_hints(Recipe)
    values: dict[str, Any] = {"seed": seed}
    for assignment in text.split(","):
        name, equals, value = assignment.strip().partition("=")
        if not equals or name not in hints:
            raise unknown_name("field", name, hints, "--recipe") if equals else SpecError(f"--recipe {text!r}: FIELD=VALUE,... is expected")
        values[name] = _recipe_value(name, value, hints[name])
    return Recipe.from_json(values)


def _recipe_value(name: str, text: str, hint: Any) -> Any:
    if hint is bool:
        allowed = {"true": True, "false": False}
        if text.lower() not in allowed:
            raise SpecError(f"--recipe: {name} is {text!r}; allowed: true, false")
        return allowed[text.lower()]
    try:
        if hint in (int, float):
            return hint(text)
        return tuple(int(grid) for grid in text.split("/")) if name == "mixing_grids" else text
    except ValueError as error:
        raise SpecError(f"--recipe: {name} is {text!r}; a number is expected") from error


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="catalogue name, method's string, path of a spec's JSON, or digest")
    parser.add_argument("--runs", metavar="DIR", help="where to look a digest up; default: ./runs")
    parser.add_argument("--tracking-uri", metavar="URI", help="where to look a digest up instead")


def _add_measuring_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=_whole_number, default=0, help="of weights, curves, images and strategies")
    sources = "digits, folder:PATH, tar:PATH, parquet:PATH, webdataset:PATH or torchvision:NAME:ROOT"
    parser.add_argument("--data", default="digits", metavar="SOURCE", help=f"images: {sources}")
    parser.add_argument("--gpus", type=_non_negative_float, default=0.0, metavar="N", help="GPUs per trial; above 0 measures on the GPU")
    parser.add_argument(
        "--set", action="append", default=[], metavar="E.FIELD=VALUE", help="a setting of an evaluator, e.g. as_vit.num_repeats=3"
    )


def _run_settings(study: str, args: argparse.Namespace) -> RunSettings:
    chosen: dict[str, dict[str, str]] = {}
    for assignment in args.set:
        place, equals, value = assignment.partition("=")
        name, dot, field = place.partition(".")
        if not (equals and dot and name and field):
            raise SpecError(f"--set {assignment!r} is malformed; EVALUATOR.FIELD=VALUE is expected, e.g. as_vit.num_repeats=3")
        chosen.setdefault(name, {})[field] = value
    flags = {name: getattr(args, name, None) for name in RunSettings.__dataclass_fields__}
    known = {name: value for name, value in flags.items() if value is not None}
    return RunSettings(
        **{
            **known,
            "study": study,
            "runs": _runs_folder(args.runs),
            "num_trials": getattr(args, "trials", None),
            "storage": _lasting_store(getattr(args, "storage", None), "--storage"),
            "tracking_uri": _lasting_store(args.tracking_uri, "--tracking-uri"),
            "evaluator_settings": chosen,
        }
    )


def _refuse_settings_of_others(settings: RunSettings, names: list[str]) -> None:
    for name in settings.evaluator_settings:
        if name not in names:
            raise unknown_name("evaluator", name, names, "--set")


def _lasting_store(location: str | None, flag: str) -> str | None:
    """A store that is still there after the run: a file by its absolute path, a URL as it is."""
    if location is None:
        return None
    path = location.removeprefix("sqlite:///")
    if "://" in path:
        return location
    if IN_RAY_JOB in os.environ and not Path(path).expanduser().is_absolute():
        raise SpecError(f"{flag} {location!r} is relative, but a Ray job runs in a throw-away copy of its folder: give an absolute path")
    return location.removesuffix(path) + str(Path(path).expanduser().absolute())


def _runs_folder(flag: str | None) -> Path:
    """Where results go, absolute; inside a Ray job the current directory is a copy whose name changes with every edit."""
    in_ray_job = IN_RAY_JOB in os.environ
    if in_ray_job and flag and not Path(flag).expanduser().is_absolute():
        raise SpecError(f"--runs {flag!r} is relative, but a Ray job runs in a throw-away copy of its folder: give an absolute path")
    if flag:
        return Path(flag).expanduser().absolute()
    if in_ray_job:
        return Path(os.environ.get("VITSCALE_RUNS") or "~/vitscale/runs").expanduser().absolute()
    return default_runs(os.environ)


def _ray_address(flag: str | None) -> str:
    # Outside a job RAY_ADDRESS may hold the address that jobs are submitted to, which no driver can join.
    return flag or ("auto" if IN_RAY_JOB in os.environ else "local")


def _number(kind: type, is_allowed: Callable[[Any], bool], meaning: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_allowed(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")
        return value

    return parse


_any_int = _number(int, lambda value: True, "a whole number")
_any_float = _number(float, lambda value: True, "a number")
_positive_int = _number(int, lambda value: value > 0, "a whole number above 0")
_whole_number = _number(int, lambda value: value >= 0, "a whole number from 0")
_positive_float = _number(float, lambda value: 0 < value < float("inf"), "a number above 0")
_non_negative_float = _number(float, lambda value: 0 <= value < float("inf"), "a number from 0")


def _command() -> str:
    import shlex

    return shlex.join(["search/run.py", *map(without_password, sys.argv[1:])])


if __name__ == "__main__":
    sys.exit(main())
