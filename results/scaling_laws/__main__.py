"""Fit a scaling law to a CSV file: the answer in words, its table, JSON, a figure.

    python -m results.scaling_laws FILE.csv --x patch --y loss [--at X] [--json] [--png FILE] [--html FILE]
    python -m results.scaling_laws FILE.csv --x N D --y loss

Every row is a training. Rows that agree in x are replicates by seed, and tell the noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from results.waiting import waiting


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m results.scaling_laws", description="Fit a scaling law, with honest intervals.")
    parser.add_argument("file", type=Path, metavar="FILE", help="CSV with a header line; rows that agree in x are replicates by seed")
    parser.add_argument("--x", nargs="+", required=True, metavar="COLUMN", help="one variable, as patch; or two, as N D")
    parser.add_argument("--y", required=True, metavar="COLUMN", help="what is fitted: a loss, an error rate, a cost")
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="only these rows; may be given again")
    parser.add_argument(
        "--form", default="", metavar="FORM", help="saturating_power (default), power or log_linear; chinchilla for two variables"
    )
    parser.add_argument("--sd", type=float, metavar="SD", help="standard deviation of y between seeds, if it is known from elsewhere")
    parser.add_argument(
        "--at", nargs="+", action="append", default=[], type=float, metavar="X", help="predict here, with an interval or not at all"
    )
    parser.add_argument("--resamples", type=int, default=4000, metavar="N", help="of the bootstrap (default: 4000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the figure of the points, the curve and its band")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write it as a page")
    options = parser.parse_args(arguments)
    try:
        where = _where(options.where)
        _check(options)

        from results.scaling_laws.fitting import fit_laws
        from results.scaling_laws.points import read_points
        from results.scaling_laws.text import laws_text

        points = read_points(options.file, options.x, options.y, where)
        at = [[value] for values in options.at for value in values] if len(options.x) == 1 else options.at
        with waiting(f"fitting {options.file}"):
            laws = fit_laws(points, form=options.form, noise_sd=options.sd, at=at, num_resamples=options.resamples, seed=options.seed)
        print(json.dumps(laws.to_json(), indent=1, allow_nan=False) if options.json else laws_text(laws))
        if options.png or options.html:
            from results.figures import scaling

            title = ", ".join([options.file.stem, *options.where])
            for path, write in ((options.png, scaling.write_png), (options.html, scaling.write_html)):
                if path is not None:
                    with waiting(f"drawing {path}"):
                        write({laws.law.form.formula: laws.law}, path, title=title)
                    print(f"written: {path}", file=sys.stderr if options.json else sys.stdout)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _where(conditions: Sequence[str]) -> dict[str, str]:
    for condition in conditions:
        if "=" not in condition:
            raise ValueError(f"--where is {condition!r}; COLUMN=VALUE is expected")
    return dict(condition.split("=", 1) for condition in conditions)


def _check(options: argparse.Namespace) -> None:
    if len(options.x) > 2:
        raise ValueError(f"--x names {len(options.x)} columns; one or two are expected")
    for values in options.at:
        if len(options.x) == 2 and len(values) != 2:
            raise ValueError(f"--at has {len(values)} numbers; one for each of {' '.join(options.x)} is expected")
        if wrong := [value for value in values if not 0 < value < float("inf")]:
            raise ValueError(f"--at is {wrong[0]:g}; a positive number is expected")
    if options.resamples < 100:
        raise ValueError(f"--resamples is {options.resamples}; at least 100 are expected, an interval is read from their tails")
    if options.seed < 0:
        raise ValueError(f"--seed is {options.seed}; 0 or more is expected")


if __name__ == "__main__":
    sys.exit(main())
