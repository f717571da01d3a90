"""What to try next: studies, strategies, the loop and the command line.

For driving a study through Optuna alone:

    import search

    study = search.open_study("as_vit/topology", runs="runs", img_size=224, proxy_img_size=64)
    study.optimize(search.objective("as_vit/topology", runs="runs", img_size=224, proxy_img_size=64), n_trials=10)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search.service import objective, open_study

__all__ = ["objective", "open_study"]


def __getattr__(name: str) -> Any:
    # Optuna and torch are imported when a study is opened, not when the command line looks for a name.
    if name in __all__:
        import search.service

        return getattr(search.service, name)
    raise AttributeError(f"module 'search' has no attribute {name!r}")
