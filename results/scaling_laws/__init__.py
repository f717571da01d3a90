"""Scaling laws: curves fitted to losses or costs, with intervals that say what the data do not tell.

    python -m results.scaling_laws FILE.csv --x patch --y loss [--at X] [--json]
    python -m results.scaling_laws FILE.csv --x N D --y loss

A study calls `results.scaling_laws.fitting.fit_laws` with its `Points`.
"""
