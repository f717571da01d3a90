"""A search space around one candidate, from axes as a user writes them: `TARGET=CHOICES`.

    pooling=mean,gem,ggem                    components of a kind
    feed_forward=mlp,hidden_dim=96,squeeze   with choices of their own, as `describe --set` takes them
    feed_forward.ratio=2,4                   one choice, where the component has it and it is not given
    depth=2..6                               a field of the network: embed_dim or depth
    recipe.lr=1e-4..1e-2:log                 a field of the recipe
    profile.batch_size=1,8                   a setting of an evaluator

A choice that a component needs, and that nothing gives, becomes an axis over the values that the component offers to a search.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_origin, get_type_hints

from search.budget import random_point
from space.component import KINDS, Scalar, declaration
from space.cost import cost
from space.edits import Part, lacking, parse_parts, part_text, parts_of, with_choice, with_field, with_part
from space.model import Model, require_arch, resized
from space.recipe import Recipe, recipe_field_type
from space.registry import SpecError, unknown_name
from space.search_space import Axis, Candidate, SearchSpace
from space.spec import ArchSpec, Component
from space.values import Interval, distinct, parse_choices, value_text
from workers.evaluator import Call, evaluators

FIELDS = ("embed_dim", "depth")
RECIPE = "recipe"
NUM_TRIED = 64
"""Candidates drawn for a choice before it is taken to fit none; a choice that fits a tenth of them is missed once in 800 times."""

MakeRecipe = Callable[[Mapping[str, Any]], Recipe]


def composed_space(
    name: str,
    model: Model,
    texts: Sequence[str],
    *,
    calls: Sequence[Call],
    recipe: MakeRecipe | None,
    proxy_img_size: int | None = None,
) -> SearchSpace:
    """The space of the axes in `texts` around `model`; what no axis says stays as it is, and their order means nothing.

    `recipe` makes a candidate's recipe from the fields that axes say; it is None if nothing is trained. `calls` are what is measured.
    Raises SpecError naming the axis for a target or a choice that is unknown, not allowed, or fits no network of the space.
    """
    chosen = _targets(texts, calls)
    of_network = next((target for target in chosen if _head(target) in (*KINDS, *FIELDS)), None)
    arch = require_arch(model, _where(of_network)) if of_network else None
    parts = {target: parse_parts(target, text, _where(target)) for target, text in chosen.items() if target in KINDS}
    axes = [_axis(target, text, arch, parts, calls, recipe) for target, text in chosen.items()]

    def decode(params: Mapping[str, Any]) -> Candidate:
        network = model if arch is None else _network(arch, params, parts)
        said = {target.partition(".")[2]: value for target, value in params.items() if _head(target) == RECIPE}
        return Candidate(
            model=network,
            recipe=recipe(said) if recipe else None,
            proxy=resized(require_arch(network, "--proxy-img-size"), img_size=proxy_img_size) if proxy_img_size else None,
            settings=_settings(params, calls),
            label=_label(params),
        )

    needed = _needed(arch, parts, chosen) if arch else []
    space = SearchSpace(name=name, axes=_in_order([*axes, *needed]), decode=decode)
    impossible = _impossible(space, calls)
    for axis in axes:
        for choice, reason in impossible[axis.name].items():
            raise SpecError(f"{_where(axis.name)}: {value_text(choice)} fits no candidate: {reason}")
    offered = [replace(axis, choices=tuple(choice for choice in _listed(axis) if choice not in impossible[axis.name])) for axis in needed]
    return replace(space, axes=_in_order([*axes, *offered]))


def needed_choices(space: SearchSpace, texts: Sequence[str]) -> list[str]:
    """A sentence for each axis of a composed space that is not among `texts`."""
    written = {text.partition("=")[0].strip() for text in texts}
    sentences = []
    for axis in space.axes:
        if axis.name not in written and axis.when is not None:
            values = ", ".join(map(value_text, _listed(axis)))
            sentences.append(
                f"{axis.name} is an axis, too ({values}): {' and '.join(map(str, _values(axis.when[1])))} needs one, and no flag gives it"
            )
    return sentences


def _targets(texts: Sequence[str], calls: Sequence[Call]) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for text in texts:
        target, equals, choices = (word.strip() for word in text.partition("="))
        if not equals or not choices:
            raise SpecError(f"--axis {text!r} is malformed; TARGET=CHOICES is expected, e.g. pooling=mean,gem or recipe.lr=1e-4..1e-2:log")
        head, dot, rest = target.partition(".")
        head = evaluators.todays_name(head)
        known = (*KINDS, *FIELDS) if not dot else (*KINDS, RECIPE, *(call.name for call in calls))
        if head not in known:
            words = "part of the network" if not dot else "part, recipe or evaluator"
            raise unknown_name(words, head, known, f"--axis {text}")
        if f"{head}{dot}{rest}" in chosen:
            raise SpecError(f"--axis {target} is given twice; write all its choices into one")
        chosen[f"{head}{dot}{rest}"] = choices
    return chosen


def _axis(
    target: str, text: str, arch: ArchSpec | None, parts: Mapping[str, Sequence[Part]], calls: Sequence[Call], recipe: MakeRecipe | None
) -> Axis:
    where, (head, _, name) = _where(target), target.partition(".")
    if target in KINDS:
        return Axis(name=target, choices=distinct(tuple(map(part_text, parts[target])), where))
    if target in FIELDS:
        return Axis(name=target, choices=parse_choices(text, int, where))
    if head in KINDS:
        assert arch is not None
        return _choice_axis(target, text, arch, parts)
    if head == RECIPE:
        if recipe is None:
            raise SpecError(f"{where}: {', '.join(call.name for call in calls)} trains nothing; --evaluators train,... does")
        hint = recipe_field_type(name, where)
        if get_origin(hint) is tuple:
            raise SpecError(f"{where}: {name} is a list itself and no axis; --recipe {name}=... gives all candidates the same")
        axis = Axis(name=target, choices=parse_choices(text, hint, where))
        _try(axis, lambda value: recipe({name: value}))
        return axis
    call = next(call for call in calls if call.name == head)
    hints = get_type_hints(type(call.settings))
    if name not in hints:
        raise unknown_name("setting", name, hints, where)
    axis = Axis(name=target, choices=parse_choices(text, hints[name], where))
    _try(axis, lambda value: call.changed({name: value}))
    return axis


def _choice_axis(target: str, text: str, arch: ArchSpec, parts: Mapping[str, Sequence[Part]]) -> Axis:
    """An axis over one choice: of the components that the axis of their kind lists without it, else of those that are there."""
    where, (kind, _, name) = _where(target), target.partition(".")
    listed = [part for part in parts.get(kind, list(parts_of(arch, kind))) if part is not None]
    without = [part for part in listed if kind not in parts or name not in part.choices]
    declared = {part: choices[name] for part in without if name in (choices := declaration(kind, part.name).choices)}
    if not declared or (kind not in parts and len(declared) < len(listed)):
        open_choices = {
            choice for part in without for choice in declaration(kind, part.name).choices if kind not in parts or choice not in part.choices
        }
        raise unknown_name("open choice", name, open_choices, f"{where}, of {kind} {', '.join(map(part_text, listed)) or 'none'}")
    axis = Axis(
        name=target,
        choices=parse_choices(text, next(iter(declared.values())).value_type, where),
        when=(kind, tuple(map(part_text, declared))) if kind in parts else None,
    )
    for choice in declared.values():
        _try(axis, lambda value, choice=choice: choice.check(value, where))
    return axis


def _needed(arch: ArchSpec, parts: Mapping[str, Sequence[Part]], chosen: Mapping[str, str]) -> list[Axis]:
    """Axes over the choices that listed components need and nothing gives."""
    needing: dict[tuple[str, str], list[Component]] = {}
    for kind, listed in parts.items():
        for part in listed:
            for name in dict.fromkeys(name for old in parts_of(arch, kind) for name in lacking(kind, old, part)):
                if part is not None and f"{kind}.{name}" not in chosen:
                    needing.setdefault((kind, name), []).append(part)
    axes = []
    for (kind, name), found in needing.items():
        offers = {part_text(part): declaration(kind, part.name).choices[name].offered for part in found}
        if len(set(offers.values())) > 1:
            raise SpecError(f"{_where(kind)}: {' and '.join(offers)} need different values of {name!r}; write one behind each")
        axes.append(Axis(name=f"{kind}.{name}", choices=next(iter(offers.values())), when=(kind, tuple(offers))))
    return axes


def _impossible(space: SearchSpace, calls: Sequence[Call]) -> dict[str, dict[Scalar, str]]:
    """By axis, the choices with which none of `NUM_TRIED` candidates can be measured, and why the last of them cannot."""
    generator = random.Random(0)
    return {
        axis.name: {choice: reason for choice in _listed(axis) if (reason := _why_never(space, axis, choice, calls, generator))}
        for axis in space.axes
    }


def _why_never(space: SearchSpace, axis: Axis, choice: Scalar, calls: Sequence[Call], generator: random.Random) -> str:
    from workers.evaluate import subject_of

    reason = ""
    for _ in range(NUM_TRIED):
        parent = {axis.when[0]: generator.choice(_values(axis.when[1]))} if axis.when else {}
        try:
            candidate = space.decode(random_point(space, generator, {**parent, axis.name: choice}))
            for call in calls:
                own = call.changed(candidate.settings.get(call.name, {}))
                own.check(subject_of(call, candidate), candidate.recipe, candidate.weights)
            return ""
        except SpecError as error:
            reason = str(error)
    return reason


def _network(arch: ArchSpec, params: Mapping[str, Scalar], parts: Mapping[str, Sequence[Part]]) -> ArchSpec:
    """The network at a point; raises SpecError if it cannot be built."""
    for target, value in params.items():
        head, _, name = target.partition(".")
        if target in KINDS:
            part = next(part for part in parts[head] if part_text(part) == value)
            arch = with_part(arch, head, part and Component(part.name, **part.choices, **_choices_of(head, params)), _where(head))
        elif target in FIELDS:
            assert isinstance(value, int)
            arch = with_field(arch, target, value, _where(target))
        elif head in KINDS and head not in parts:
            arch = with_choice(arch, head, name, value, _where(target))
    cost(arch)
    return arch


def _choices_of(kind: str, params: Mapping[str, Scalar]) -> dict[str, Scalar]:
    return {target.partition(".")[2]: value for target, value in params.items() if target.startswith(f"{kind}.")}


def _settings(params: Mapping[str, Scalar], calls: Sequence[Call]) -> dict[str, dict[str, Scalar]]:
    settings = {call.name: _choices_of(call.name, params) for call in calls}
    return {name: chosen for name, chosen in settings.items() if chosen}


def _label(params: Mapping[str, Scalar]) -> str:
    words = []
    for target, value in params.items():
        head, dot, name = target.partition(".")
        if dot and head in params:
            continue
        own = "".join(f",{choice}={value_text(chosen)}" for choice, chosen in _choices_of(target, params).items())
        words.append(f"{name if head == RECIPE else target}={value_text(value)}{own}")
    return " ".join(words)


def _try(axis: Axis, use: Callable[[Scalar], object]) -> None:
    """Use every choice that is listed, and both ends of an interval; raises SpecError naming the axis for one that is not allowed."""
    try:
        for choice in _listed(axis):
            use(choice)
    except SpecError as error:
        where = _where(axis.name)
        raise SpecError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error


def _listed(axis: Axis) -> tuple[Scalar, ...]:
    """The choices of an axis; both ends of an interval."""
    return (axis.choices.low, axis.choices.high) if isinstance(axis.choices, Interval) else tuple(axis.choices)


def _in_order(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """By name: a kind stands before its choices, and the order of flags makes no other space."""
    return tuple(sorted(axes, key=lambda axis: axis.name))


def _head(target: str) -> str:
    return target.partition(".")[0]


def _where(target: str) -> str:
    return f"--axis {target}"


def _values(values: Scalar | tuple[Scalar, ...]) -> tuple[Scalar, ...]:
    return values if isinstance(values, tuple) else (values,)
