#!/usr/bin/env python3
"""The command line of vitscale: run a study, list what there is, describe or evaluate one model."""

from __future__ import annotations

import os
import sys
import warnings

from search.commands import COMMANDS, run_a_study
from search.study import studies
from space.registry import unknown_name

USAGE = """\
usage: search/run.py STUDY [flags]                        run or resume a study (--help lists the flags)
       search/run.py list                                 studies, models, components, evaluators, mixings, strategies
       search/run.py describe MODEL [--set TARGET=VALUE]  its parts, parameters, MACs and digest, changed or as it is
       search/run.py evaluate MODEL --evaluators A,B ...  measure one model now, without a study

MODEL is a catalogue name (deit_small), a method's string (as_vit:8,2,3|4,1,2|4,1,4|4,1,6|32), a model of timm
(timm:vit_tiny_patch16_224), the path of a spec's JSON, or the digest of a leaderboard entry, of which the first four
digits are enough.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command in `argv`; returns the exit status: 2 for a user's mistake, 1 when the work itself failed."""
    argv = sys.argv[1:] if argv is None else argv
    # Ray and MLflow report usage over the network unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # timm still uses torch.jit, which torch 2.15 comments on at every import.
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(USAGE + f"\nstudies: {', '.join(studies.names())}")
            return 0 if argv else 2
        if argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        if argv[0] not in studies.names():
            raise unknown_name("study or command", argv[0], [*studies.names(), *COMMANDS])
        return run_a_study(argv[0], argv[1:])
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


if __name__ == "__main__":
    sys.exit(main())
