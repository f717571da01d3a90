"""The leaderboard of a study: every finished trial with its rank, as a table, CSV, one HTML page and a figure.

    python -m results.leaderboard STUDY [--top N] [--phase P] [--wide] [--csv FILE] [--html FILE] [--png FILE] ...

A table leaves out the columns that do not fit the terminal and says so; `--wide` prints them all.

`results/study_results.py` says how trials are ranked.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from results import page
from results.columns import terminal_width
from results.figures import leaderboard
from results.mlflow_store import UnreadableStudy
from results.paths import RunPaths, default_runs, place_flags, without_password
from results.report import StudyReport, load_report
from results.text import print_results
from results.waiting import AT_ONCE_S, waiting


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m results.leaderboard", description="Show what a study has measured, best first.")
    parser.add_argument("study", metavar="STUDY", help="the study's name, as given to search/run.py")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="rows to print per phase (default: 20)")
    parser.add_argument("--phase", metavar="P", help="only this phase")
    parser.add_argument("--wide", action="store_true", help="print all columns, however wide the terminal is")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all rows and columns as CSV")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page: figures, sortable table, provenance")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the figure of scores and MACs")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="runs directory (default: $VITSCALE_RUNS, else ./runs)")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow store or server (default: sqlite in the runs directory)")
    options = parser.parse_args(arguments)
    if options.top < 1:
        parser.error(f"--top is {options.top}; at least 1 is expected")
    paths = RunPaths(options.runs or default_runs(os.environ))
    uri = options.tracking_uri or paths.mlflow_uri
    try:
        with waiting(f"reading study {options.study!r} from {without_password(uri)}", first_s=AT_ONCE_S):
            report = load_report(uri, options.study)
        if options.phase is not None:
            report = report.only(options.phase)
        place = place_flags(paths.root, options.tracking_uri, os.environ)
        print_results(report, options.top, place, width=terminal_width(), wide=options.wide)
        for path, write in ((options.csv, _write_csv), (options.html, page.write_html), (options.png, _write_png)):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with waiting(f"writing {path}"):
                    write(report, path)
                print(f"written: {path}")
    except (UnreadableStudy, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write_csv(report: StudyReport, path: Path) -> None:
    report.results.frame.to_csv(path, index=False)


def _write_png(report: StudyReport, path: Path) -> None:
    leaderboard.write_png(report.results, path)


if __name__ == "__main__":
    sys.exit(main())
