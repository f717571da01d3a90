"""The recipe of trainings for which the user names none."""

from __future__ import annotations

from typing import Any

from search.study import CONVERGING, DEFAULT_DATA, RunSettings
from space.recipe import Recipe


def default_recipe(run: RunSettings, *, img_size: int, epochs: int = 0, batch_size: int = 0, lr: float = 0.0, **fields: Any) -> Recipe:
    """A recipe for the run's data and images of `img_size` pixels, with these `fields`; 0 is the default for the data."""
    is_digits = run.data == DEFAULT_DATA
    # Studies that were created before keep what they had: 20 epochs and crops, which digits do not converge in.
    converges = is_digits and run.defaults >= CONVERGING
    epochs = epochs or (60 if converges else 20)
    lr = lr or (3e-3 if is_digits else 1e-3)
    return Recipe(
        epochs=epochs,
        batch_size=batch_size or (32 if is_digits else 128),
        lr=lr,
        min_lr=lr / 100,
        warmup_epochs=epochs / 10,
        # A mirrored digit is another digit, or none; and digits fill their square, so that a crop cuts strokes off.
        flip=not is_digits,
        crop="none" if converges else "pad" if img_size < 64 else "resized",
        **fields,
    )
