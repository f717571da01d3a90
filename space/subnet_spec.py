"""A subnet as a value: `SubnetSpec`, an architecture cut out of a supernet. Importing it imports no torch.

Two subnets of equal shape that keep different blocks are two models: they inherit different weights from their supernet, so a score of one
is not a score of the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from space.registry import SpecError, unknown_name
from space.spec import ArchSpec, Component, digest_of, full_choices

_FIELDS = ("supernet", "arch", "kept")


@dataclass(frozen=True, kw_only=True)
class SubnetSpec:
    """`arch` cut out of `supernet`: block i of stage s is block `kept[s][i]` of stage s of the supernet.

    Both have the same stages, the same components by name and the same images and classes. No width and no whole-number choice of
    a component is above the supernet's; all other choices are equal. Raises SpecError where this does not hold.
    """

    kind: ClassVar[str] = "subnet"

    supernet: ArchSpec
    arch: ArchSpec
    kept: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        whole, part = self.supernet, self.arch
        for name in ("img_size", "in_chans", "num_classes"):
            if getattr(part, name) != getattr(whole, name):
                raise SpecError(f"{name} is {getattr(part, name)}; the supernet's is {getattr(whole, name)}, and they must be equal")
        if len(part.stages) != len(whole.stages):
            raise SpecError(f"the subnet has {_count(len(part.stages), 'stage')}; the supernet has {_count(len(whole.stages), 'stage')}")
        object.__setattr__(self, "kept", _checked_kept(self.kept, part, whole))
        for index, stage in enumerate(part.stages):
            widest = whole.stages[index].embed_dim
            if stage.embed_dim > widest:
                raise SpecError(f"stages[{index}]: embed_dim is {stage.embed_dim}; allowed: at most the supernet's {widest}")
        for where, kind, ours, theirs in self._pairs():
            _check_part(where, kind, ours, theirs)

    def _pairs(self) -> Iterator[tuple[str, str, Component | None, Component | None]]:
        """Every component of `arch` with its origin in the supernet: the place, the kind, and the two components."""
        for kind in ("patch_embed", "prefix", "position", "norm", "pooling", "head"):
            yield kind, kind, getattr(self.arch, kind), getattr(self.supernet, kind)
        for index, (ours, theirs) in enumerate(zip(self.arch.stages, self.supernet.stages, strict=True)):
            yield f"stages[{index}].downsampling", "downsampling", ours.downsampling, theirs.downsampling
            for number, (block, origin) in enumerate(zip(ours.blocks, self.kept[index], strict=True)):
                for kind in ("mixer", "token_reduction", "feed_forward", "layer_scale"):
                    where = f"stages[{index}].blocks[{number}].{kind}, kept from block {origin}"
                    yield where, kind, getattr(block, kind), getattr(theirs.blocks[origin], kind)

    @property
    def img_size(self) -> int:
        return self.arch.img_size

    @property
    def in_chans(self) -> int:
        return self.arch.in_chans

    @property
    def num_classes(self) -> int:
        return self.arch.num_classes

    @property
    def digest(self) -> str:
        """16 hex digits of the canonical JSON's SHA-256."""
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The canonical JSON object, which holds the whole supernet."""
        kept = [list(blocks) for blocks in self.kept]
        return {"model": self.kind, "supernet": self.supernet.to_json(), "arch": self.arch.to_json(), "kept": kept}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SubnetSpec:
        """The spec of `to_json`'s object; raises SpecError saying which field is wrong."""
        if not isinstance(data, Mapping) or data.get("model") != cls.kind:
            raise SpecError('not the JSON of a subnet: an object with "model": "subnet" is expected')
        for name in data:
            if name not in _FIELDS and name != "model":
                raise unknown_name("field", name, _FIELDS, "subnet")
        if missing := [name for name in _FIELDS if name not in data]:
            raise SpecError(f"subnet lacks {', '.join(missing)}")
        archs = {name: _arch_from_json(data[name], f"subnet.{name}") for name in ("supernet", "arch")}
        try:
            return cls(**archs, kept=data["kept"])
        except SpecError as error:
            raise SpecError(f"subnet: {error}") from error

    def origin(self, path: str) -> str:
        """The path that a module of the subnet has in the supernet: `stages.0.blocks.1.mixer` -> `stages.0.blocks.3.mixer`."""
        match path.split("."):
            case ["stages", stage, "blocks", number, *rest]:
                return ".".join(["stages", stage, "blocks", str(self.kept[int(stage)][int(number)]), *rest])
        return path


def _checked_kept(kept: Any, part: ArchSpec, whole: ArchSpec) -> tuple[tuple[int, ...], ...]:
    if not isinstance(kept, tuple | list) or len(kept) != len(part.stages):
        raise SpecError(f"kept is {kept!r}; one list of block numbers for each of the {_count(len(part.stages), 'stage')} is expected")
    for index, (blocks, ours, theirs) in enumerate(zip(kept, part.stages, whole.stages, strict=True)):
        where = f"kept[{index}] is {blocks!r}"
        if not isinstance(blocks, tuple | list) or any(type(block) is not int for block in blocks):
            raise SpecError(f"{where}; a list of block numbers is expected")
        if len(blocks) != len(ours.blocks):
            raise SpecError(f"{where}; one number is needed for each of the stage's {_count(len(ours.blocks), 'block')}")
        depth = len(theirs.blocks)
        if any(not 0 <= block < depth for block in blocks):
            raise SpecError(f"{where}; allowed: 0 to {depth - 1}, the blocks of the supernet's stage")
        if any(later <= earlier for earlier, later in pairwise(blocks)):
            raise SpecError(f"{where}; the numbers must increase, since blocks keep their order and none is used twice")
    return tuple(map(tuple, kept))


def _check_part(where: str, kind: str, ours: Component | None, theirs: Component | None) -> None:
    if ours is None or theirs is None or ours.name != theirs.name:
        if ours is not theirs:
            raise SpecError(f"{where}: {_name(ours)} stands where the supernet has {_name(theirs)}")
        return
    most = full_choices(kind, theirs)
    for name, value in full_choices(kind, ours).items():
        if type(value) is int and value > int(most[name]):
            raise SpecError(f"{where}: {name} is {value}; allowed: at most the supernet's {most[name]}")
        if type(value) is not int and value != most[name]:
            raise SpecError(f"{where}: {name} is {value!r}; the supernet's is {most[name]!r}, and they must be equal")


def _name(part: Component | None) -> str:
    return "nothing" if part is None else repr(part.name)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _arch_from_json(data: Any, where: str) -> ArchSpec:
    try:
        return ArchSpec.from_json(data)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from error
