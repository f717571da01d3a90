"""The flags of the command line, and the run-level settings that they say."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from results.paths import default_runs
from search.budget import Budget, assigned_bounds
from search.study import DEFAULT_DATA, RunSettings, studies
from space.recipe import Recipe, parse_recipe_fields
from space.registry import SpecError

IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"

"""Set by Ray in the environment of a job's driver."""


def number(kind: type, is_allowed: Callable[[Any], bool], meaning: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_allowed(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")
        return value

    return parse


any_int = number(int, lambda value: True, "a whole number")
any_float = number(float, lambda value: True, "a number")
positive_int = number(int, lambda value: value > 0, "a whole number above 0")
whole_number = number(int, lambda value: value >= 0, "a whole number from 0")
positive_float = number(float, lambda value: 0 < value < float("inf"), "a number above 0")
non_negative_float = number(float, lambda value: 0 <= value < float("inf"), "a number from 0")


class _DefaultsHelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default of a flag that has one to say."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == []
        return action.help if says_nothing else super()._get_help_string(action)


def parse_study(study: str, argv: list[str]) -> tuple[RunSettings, argparse.Namespace]:
    """The run-level settings in the flags of `search/run.py STUDY`, and the flags themselves."""
    parser = argparse.ArgumentParser(
        prog=f"search/run.py {study}",
        description=f"{studies.summary(study)} Running the same command again resumes.",
        formatter_class=_DefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--name", metavar="NAME", help="name of the study in Optuna and MLflow, if not that of the method")
    parser.add_argument("--trials", type=positive_int, metavar="N", help="trials to complete in the phases that count them")
    add_network_flags(parser)
    parser.add_argument("--proxy-img-size", type=positive_int, metavar="PX", help="image size at which networks are scored")
    options = studies.get(study).options
    has_own_max = "max" in {field.name for field in dataclasses.fields(options)}
    bound = "of a metric that is known without measuring, e.g. gmacs=1.3; repeatable"
    if not has_own_max:
        parser.add_argument("--max", action="append", default=[], metavar="METRIC=VALUE", help=f"budget: upper bound {bound}")
    parser.add_argument("--min", action="append", default=[], metavar="METRIC=VALUE", help=f"budget: lower bound {bound}")
    parser.add_argument("--max-params-m", type=positive_float, metavar="M", help="the same as --max params_m=M, in millions")
    parser.add_argument("--max-gmacs", type=positive_float, metavar="G", help="the same as --max gmacs=G, in billions of multiply-adds")
    parser.add_argument("--strategy", metavar="NAME", help="what proposes trials; see search/run.py list; compose also takes grid, halving")
    parser.add_argument(
        "--evaluators", metavar="A,B", help="measured beside the study's own evaluators; compose measures these alone, else train"
    )
    parser.add_argument(
        "--objectives", metavar="A,B", help="metrics that decide what is tried next and the rank, in place of the study's own"
    )
    add_measuring_flags(parser)
    parser.add_argument("--time-limit-s", type=positive_float, metavar="S", help="a trial that takes longer is cancelled and failed")
    parser.add_argument("--workers", type=positive_int, metavar="N", help="most trials in flight; default: what the cluster holds")
    parser.add_argument("--ray-address", metavar="A", help="'local', 'auto' or HOST:PORT; default: the job's cluster, else local")
    parser.add_argument(
        "--runs", metavar="DIR", help="folder of all results; default: $VITSCALE_RUNS, else ./runs, in a Ray job ~/vitscale/runs"
    )
    parser.add_argument("--storage", metavar="URL", help="Optuna storage: journal file, database URL or grpc://HOST:PORT")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow tracking server or store")
    parser.add_argument(
        "--processes", type=positive_int, default=1, metavar="N", help="processes that train one network together, --gpus each"
    )
    parser.add_argument("--json", action="store_true", help="the last line of output is the result as one JSON object")
    parser.add_argument("--fresh", action="store_true", help="set the old study aside under a dated name and begin anew")
    _add_options(parser, options)
    args = parser.parse_args(argv)
    budget = _budget(args, [] if has_own_max else args.max)
    return dataclasses.replace(run_settings(study, args), budget=budget, options=_options(options, args)), args


def _budget(args: argparse.Namespace, upper: list[str]) -> Budget:
    aliases = [(f"--max-{name.replace('_', '-')}", name, getattr(args, f"max_{name}")) for name in ("params_m", "gmacs")]
    at_most = [(f"{flag} {value:g}", name, value) for flag, name, value in aliases if value is not None]
    return Budget(at_most=_bounds([*assigned_bounds("--max", upper), *at_most]), at_least=_bounds(assigned_bounds("--min", args.min)))


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
    kinds = {int: {"type": any_int, "metavar": "N"}, float: {"type": any_float, "metavar": "X"}, bool: {"action": "store_true"}}
    for field in dataclasses.fields(options):
        default = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
        shown = f" (default: {default})" if default not in ("", False) else ""
        name = {"metavar": field.metadata.get("metavar", "NAME")}
        kind = kinds.get(hints[field.name], name if hints[field.name] is str else {"action": "append", **name})
        text = field.metadata.get("help", "") + shown
        group.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text.replace("%", "%%"), **kind)


def _options(options: type, args: argparse.Namespace) -> Any:
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(options) if hasattr(args, field.name)}
    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def parse_recipe(text: str, seed: int) -> Recipe | None:
    """The recipe in `field=value,...`, trained under `seed`; None for an empty text. Grids are separated by `/`."""
    if not text:
        return None
    return Recipe.from_json({"seed": seed, **parse_recipe_fields(text, "--recipe")})


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="catalogue name, method's string, path of a spec's JSON, or a digest or its first 4 digits"
    )
    parser.add_argument("--runs", metavar="DIR", help="where to look a digest up; default: ./runs")
    parser.add_argument("--tracking-uri", metavar="URI", help="where to look a digest up instead")


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--img-size", type=positive_int, metavar="PX", help="image size of the reported networks")
    parser.add_argument("--num-classes", type=positive_int, metavar="N", help="classes of the networks; default: those of the data")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="weights that the named network starts from: .safetensors, .pth, .pt or .bin, or a folder with NAME.safetensors or the like",
    )


def add_measuring_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=whole_number, default=0, help="of weights, curves, images and strategies")
    sources = "digits, folder:PATH, tar:PATH, parquet:PATH, webdataset:PATH or torchvision:NAME:ROOT"
    parser.add_argument("--data", default=DEFAULT_DATA, metavar="SOURCE", help=f"images: {sources}")
    parser.add_argument("--gpus", type=non_negative_float, default=0.0, metavar="N", help="GPUs per trial; above 0 measures on the GPU")
    parser.add_argument(
        "--set", action="append", default=[], metavar="E.FIELD=VALUE", help="a setting of an evaluator, e.g. as_vit.num_repeats=3"
    )


def run_settings(study: str, args: argparse.Namespace) -> RunSettings:
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
            "runs": runs_folder(args.runs),
            "num_trials": getattr(args, "trials", None),
            "storage": _lasting_store(getattr(args, "storage", None), "--storage"),
            "tracking_uri": _lasting_store(args.tracking_uri, "--tracking-uri"),
            "evaluator_settings": chosen,
        }
    )


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


def runs_folder(flag: str | None) -> Path:
    """Where results go, absolute; inside a Ray job the current directory is a copy whose name changes with every edit."""
    in_ray_job = IN_RAY_JOB in os.environ
    if in_ray_job and flag and not Path(flag).expanduser().is_absolute():
        raise SpecError(f"--runs {flag!r} is relative, but a Ray job runs in a throw-away copy of its folder: give an absolute path")
    if flag:
        return Path(flag).expanduser().absolute()
    if in_ray_job:
        return Path(os.environ.get("VITSCALE_RUNS") or "~/vitscale/runs").expanduser().absolute()
    return default_runs(os.environ)


def ray_address(flag: str | None) -> str:
    # Outside a job RAY_ADDRESS may hold the address that jobs are submitted to, which no driver can join.
    return flag or ("auto" if IN_RAY_JOB in os.environ else "local")
