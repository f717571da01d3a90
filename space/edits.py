"""Changes to a network of our components, as a user writes them: `TARGET=VALUE`.

    feed_forward=mlp,hidden_dim=512    another component of a kind; what is not said stays, if the new component has such a choice
    feed_forward.hidden_dim=512        one choice of the component that is there
    prefix=none                        no component, of a kind that may be missing
    depth=8                            a field of the spec: FIELDS

A kind that stands in blocks is changed in all blocks of all stages, `downsampling` after all stages that have one. Heads and
hidden widths are counts of their own: they stay as they are when `embed_dim` changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from space.component import KINDS, REQUIRED, Choice, Scalar, declaration
from space.registry import SpecError, unknown_name
from space.spec import ArchSpec, Component
from space.values import parse_value, value_text

BLOCK_KINDS = ("mixer", "feed_forward", "token_reduction", "layer_scale")
OPTIONAL_KINDS = ("prefix", "position", "token_reduction", "layer_scale")
FIELDS = ("img_size", "in_chans", "num_classes", "embed_dim", "depth")
NONE = "none"
"""Written for a part that is not there."""

Part = Component | None


def check_target(target: str, where: str) -> None:
    """Raise SpecError unless `target` is a kind, KIND.CHOICE or a field."""
    kind, dot, choice = target.partition(".")
    if kind not in KINDS and target not in FIELDS:
        raise unknown_name("part or field of a network", target, (*KINDS, *FIELDS), where)
    if dot and not choice:
        raise SpecError(f"{where}: {target!r} names no choice; KIND.CHOICE is expected, e.g. feed_forward.hidden_dim")


def edit_from_text(spec: ArchSpec, text: str, where: str) -> tuple[str, ArchSpec]:
    """The target of `TARGET=VALUE`, and the spec with that change; raises SpecError saying `where` and what is allowed."""
    target, equals, value = (word.strip() for word in text.partition("="))
    if not equals or not value:
        raise SpecError(f"{where} {text!r} is malformed; TARGET=VALUE is expected, e.g. pooling=gem or feed_forward=mlp,hidden_dim=512")
    check_target(target, where)
    place = f"{where} {target}"
    if target in FIELDS:
        return target, with_field(spec, target, parse_value(value, int, place), place)
    kind, dot, choice = target.partition(".")
    if dot:
        return target, with_choice(spec, kind, choice, parse_value(value, _type_of(spec, kind, choice, place), place), place)
    part, *others = parse_parts(kind, value, place)
    if others:
        raise SpecError(f"{place} is {value!r}; one component is expected")
    return target, with_part(spec, kind, part, place)


def parse_parts(kind: str, text: str, where: str) -> list[Part]:
    """The components of `NAME[,CHOICE=VALUE]...,NAME...`, with the choices that are written; None for `none`."""
    written: list[tuple[str, dict[str, Scalar]]] = []
    for item in (item.strip() for item in text.split(",")):
        name, equals, value = (word.strip() for word in item.partition("="))
        if not equals:
            if name != NONE:
                declaration(kind, name, where)
            written.append((name, {}))
        elif not written or written[-1][0] == NONE:
            raise SpecError(f"{where} is {text!r}; a component's name is expected before {item!r}")
        else:
            part, choices = written[-1]
            place = f"{where}: {kind} {part!r}"
            declared = _declared(kind, part, name, where)
            choices[name] = declared.check(parse_value(value, declared.value_type, f"{place}: {name}"), f"{place}: {name}")
    if (NONE, {}) in written and kind not in OPTIONAL_KINDS:
        raise SpecError(f"{where}: there is always a {kind}; only {', '.join(OPTIONAL_KINDS)} may be {NONE}")
    return [None if name == NONE else Component(name, **choices) for name, choices in written]


def part_text(part: Part) -> str:
    """The component as `parse_parts` reads it, without choices at their default."""
    return ",".join([part.name, *(f"{name}={value_text(value)}" for name, value in part.items)]) if part else NONE


def with_part(spec: ArchSpec, kind: str, part: Part, where: str) -> ArchSpec:
    """The network with another component of `kind`; raises SpecError if a choice that it needs is neither given nor there before."""
    for old in parts_of(spec, kind):
        for name in lacking(kind, old, part):
            assert part is not None
            declared = _declared(kind, part.name, name, where)
            example = f"{part.name},{name}={value_text(declared.offered[0])}"
            raise SpecError(f"{where}: {kind} {part.name!r} needs a value for {name!r} ({declared.words}), e.g. {example}")
    return _checked(spec, kind, lambda old: exchanged(kind, old, part), where)


def with_choice(spec: ArchSpec, kind: str, choice: str, value: Scalar, where: str) -> ArchSpec:
    """The network with another value of one choice, in all its components of `kind`."""

    def changed(old: Part) -> Part:
        if old is None:
            raise SpecError(f"{where}: the network has no {kind}")
        _declared(kind, old.name, choice, where)
        return Component(old.name, **{**old.choices, choice: value})

    return _checked(spec, kind, changed, where)


def with_field(spec: ArchSpec, field: str, value: int, where: str) -> ArchSpec:
    """The network with another value of one of `FIELDS`; `embed_dim` and `depth` are those of a network of one stage."""
    if value < 1:
        raise SpecError(f"{where} is {value}; a whole number above 0 is needed")
    if field not in ("embed_dim", "depth"):
        return replace(spec, **{field: value})
    stage, *others = spec.stages
    if others:
        raise SpecError(f"{where}: the network has {len(spec.stages)} stages of their own {field}; only a network of one stage takes it")
    if field == "embed_dim":
        return replace(spec, stages=(replace(stage, embed_dim=value),))
    if len(set(stage.blocks)) > 1:
        raise SpecError(f"{where}: the blocks of the network differ, so their number cannot be changed")
    return replace(spec, stages=(replace(stage, blocks=stage.blocks[:1] * value),))


def exchanged(kind: str, old: Part, new: Part) -> Part:
    """`new` in the place of `old`, whose values stay for choices that `new` has and does not give."""
    if old is None or new is None:
        return new
    declared = declaration(kind, new.name).choices
    return Component(new.name, **{name: value for name, value in old.items if name in declared} | new.choices)


def lacking(kind: str, old: Part, new: Part) -> list[str]:
    """The choices that `new`, in the place of `old`, needs a value for."""
    part = exchanged(kind, old, new)
    declared = declaration(kind, part.name).choices if part else {}
    return [name for name, choice in declared.items() if choice.default is REQUIRED and name not in (part.choices if part else {})]


def parts_of(spec: ArchSpec, kind: str) -> Iterator[Part]:
    """The components of `kind`, each distinct one once."""
    if kind in BLOCK_KINDS:
        yield from dict.fromkeys(getattr(block, kind) for stage in spec.stages for block in stage.blocks)
    elif kind == "downsampling":
        yield from dict.fromkeys(stage.downsampling for stage in spec.stages[:-1])
    else:
        yield getattr(spec, kind)


def places(spec: ArchSpec, target: str) -> str:
    """Where in the network a change of `target` is made, in words."""
    kind = target.partition(".")[0]
    stages = "1 stage" if len(spec.stages) == 1 else f"{len(spec.stages)} stages"
    if kind in BLOCK_KINDS:
        return f"in all {spec.depth} blocks of {stages}" if spec.depth > 1 else "in the one block"
    if kind == "downsampling":
        return f"after the first {len(spec.stages) - 1} of {stages}"
    return "of the network"


def _checked(spec: ArchSpec, kind: str, change: Callable[[Part], Part], where: str) -> ArchSpec:
    if kind == "downsampling" and len(spec.stages) == 1:
        raise SpecError(f"{where}: the network has one stage, and no downsampling")
    try:
        return _changed(spec, kind, change)
    except SpecError as error:
        raise error if str(error).startswith(where) else SpecError(f"{where}: {error}") from error


def _changed(spec: ArchSpec, kind: str, change: Callable[[Part], Part]) -> ArchSpec:
    if kind in BLOCK_KINDS:
        stages = (
            replace(stage, blocks=tuple(replace(block, **{kind: change(getattr(block, kind))}) for block in stage.blocks))
            for stage in spec.stages
        )
        return replace(spec, stages=tuple(stages))
    if kind == "downsampling":
        *first, last = spec.stages
        return replace(spec, stages=(*(replace(stage, downsampling=change(stage.downsampling)) for stage in first), last))
    return replace(spec, **{kind: change(getattr(spec, kind))})


def _declared(kind: str, name: str, choice: str, where: str) -> Choice:
    choices = declaration(kind, name, where).choices
    if choice not in choices:
        raise unknown_name("choice", choice, choices, f"{where}: {kind} {name!r}")
    return choices[choice]


def _type_of(spec: ArchSpec, kind: str, choice: str, where: str) -> type:
    part = next((part for part in parts_of(spec, kind) if part is not None), None)
    if part is None:
        raise SpecError(f"{where}: the network has no {kind}")
    return _declared(kind, part.name, choice, where).value_type
