"""Where a browser shows the leaderboards of all studies in MLflow.

python -m results.browse [TRACKING_URI]        (default: sqlite in $VITSCALE_RUNS, else ./runs)
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from results.mlflow_store import view_addresses
from results.mlflow_views import how_to_browse
from results.paths import RunPaths, default_runs, without_password
from results.waiting import AT_ONCE_S, waiting


def main(arguments: Sequence[str]) -> int:
    uri = arguments[0] if arguments else RunPaths(default_runs(os.environ)).mlflow_uri
    into_it = f" --tracking-uri {shlex.quote(without_password(uri))}" if arguments else ""
    try:
        with waiting(f"reading {without_password(uri)}", first_s=AT_ONCE_S):
            addresses = view_addresses(uri)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    none_yet = f"no study in {without_password(uri)} yet; this makes one: search/run.py smoke{into_it}"
    print("\n".join(how_to_browse(uri, addresses) or [none_yet]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
