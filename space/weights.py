"""The weights that a network starts from, as a value: `Weights`. Importing it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""Of the files that hold weights."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A local file of weights, known by its bytes: two files with the same bytes are equal, wherever they lie.

    `checksum` is 32 hex digits of the SHA-256 of the file. `layout` says how its tensors are named: as timm's, or as those of our own
    networks. `mean` and `std` are the input normalisation of the network that the weights come from, per channel and for pixels from 0 to
    1; None is that of all our images.
    """

    checksum: str
    layout: Literal["timm", "vitscale"] = field(compare=False)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    path: Path = field(compare=False)
    """Where the file is looked for. Whoever reads it compares its checksum."""
    has_classifier: bool = field(default=True, compare=False)
    """Whether the network that the file was chosen for gets its classifier."""
    changes: tuple[str, ...] = field(default=(), compare=False)
    """What differs between the file and the network that it was chosen for, a sentence each without a full stop."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON of what a measurement that starts from these weights depends on."""
        normalisation = {} if self.mean is None or self.std is None else {"mean": list(self.mean), "std": list(self.std)}
        return {"sha256": self.checksum, **normalisation}

    def to_json(self) -> dict[str, Any]:
        """The identity, and the name of the file for a reader."""
        return {**self.identity, "file": self.path.name}

    @property
    def summary(self) -> str:
        """One line about the file and what is changed of it."""
        layout = "timm's layout" if self.layout == "timm" else "our layout"
        return f"weights {self.path.name} (sha256 {self.checksum[:16]}, {layout}): {'; '.join(self.changes) or 'taken as they are'}"
