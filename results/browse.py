"""Where a browser shows the leaderboards of all studies in MLflow.

python -m results.browse [TRACKING_URI]        (default: sqlite in $VITSCALE_RUNS, else ./runs)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from results.mlflow_store import view_addresses
from results.mlflow_views import how_to_browse
from results.paths import RunPaths, default_runs, without_password


def main(arguments: Sequence[str]) -> int:
    uri = arguments[0] if arguments else RunPaths(default_runs(os.environ)).mlflow_uri
    try:
        addresses = view_addresses(uri)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(how_to_browse(uri, addresses) or [f"no study in {without_password(uri)} yet; search/run.py smoke makes one"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
