"""Tensors of a file fitted to a network: timm's names turned into ours, positions and patch embeddings resampled, classifiers replaced."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from space.layout import layout
from space.registry import SpecError
from space.spec import ArchSpec, Component

SHOWN_PROBLEMS = 4


class Fitted(NamedTuple):
    """Tensors by the names of the network's state dict, and what was changed, a sentence each without a full stop.

    A tensor that is not there stays as the network was initialised. `has_classifier` says whether all of the classifier is there.
    """

    tensors: dict[str, Tensor]
    changes: tuple[str, ...]
    has_classifier: bool


_TIMM_NAMES = {
    "cls_token": "prefix.class_token",
    "reg_token": "prefix.registers",
    "pos_embed": "position.pos_embed",
    "blocks": "stages.0.blocks",
    "attn": "mixer",
    "mlp": "feed_forward.mlp",
    "ls1": "layer_scale1",
    "ls2": "layer_scale2",
    # As the repository of DeiT III stores them.
    "gamma_1": "layer_scale1.gamma",
    "gamma_2": "layer_scale2.gamma",
}
"""A step of a name in timm's VisionTransformer, and the steps of ours; the tensors themselves are laid out in the same way."""


def from_timm(name: str) -> str:
    """The name of a parameter of timm's `VisionTransformer` in ours; a step that both have is left as it is."""
    return ".".join(_TIMM_NAMES.get(step, step) for step in name.split("."))


def is_in_our_layout(names: Iterable[str]) -> bool:
    """Whether these are names of a network of our components: timm has stages of blocks too, but calls no part of them a mixer."""
    return any(name.startswith("stages.0.blocks.0.mixer.") for name in names)


FREE_OF_SHAPE = frozenset({"mixer", "norm", "downsampling"})
"""Kinds of components with choices that no shape of a tensor tells, such as the number of heads."""


def fit_to_arch(spec: ArchSpec, tensors: Mapping[str, Tensor], stored: ArchSpec | None) -> Fitted:
    """The tensors of a network like that of `spec`, in timm's layout or ours, fitted to it; `stored` is their network, if it is known.

    Only these may differ: the classifier, the pooling, the number of positions and the size of the patches. Raises SpecError naming what
    else is missing, left over or of another shape.
    """
    from space.vit import VisionTransformer

    if stored is not None and (difference := _unseen_difference(stored, spec)):
        raise SpecError(difference)
    with torch.device("meta"):
        own = VisionTransformer(spec).state_dict()
    fitted = dict(tensors) if is_in_our_layout(tensors) else {from_timm(name): tensor for name, tensor in tensors.items()}
    replaced = replace_classifier(fitted, own, ("head.",))
    changes = [
        *replaced,
        *(_replace_pooling(fitted, own) or _other_parts(stored, spec, "pooling")),
        *_other_parts(stored, spec, "token_reduction"),
        *_resample_positions(spec, fitted, own),
        *_resample_patches(fitted, own),
    ]
    if problems := differences(fitted, own, fresh=("head.", "pooling.")):
        raise SpecError(problems)
    return Fitted(fitted, tuple(changes), has_classifier=not replaced)


def _unseen_difference(there: ArchSpec, here: ArchSpec) -> str:
    """The first thing that two networks differ in without any tensor showing it; empty if there is none."""
    theirs, ours = ({part.path: part.component for part in layout(spec) if part.kind in FREE_OF_SHAPE} for spec in (there, here))
    paths = [path for path in ours if path in theirs and ours[path] != theirs[path]]
    return f"{paths[0]} is {theirs[paths[0]]} there and {ours[paths[0]]} here" if paths else ""


def _other_parts(there: ArchSpec | None, here: ArchSpec, kind: str) -> list[str]:
    """A sentence if the parts of a kind without tensors differ, which is as it may be, and changes what the network gives."""
    if there is None:
        return []
    theirs, ours = ([part.component for part in layout(spec) if part.kind == kind] for spec in (there, here))
    return [f"{kind} is {_listed(theirs)} there and {_listed(ours)} here"] if theirs != ours else []


def _listed(components: Sequence[Component]) -> str:
    return " ".join(dict.fromkeys(map(str, components))) or "none"


def differences(given: Mapping[str, Tensor], own: Mapping[str, Tensor], *, fresh: tuple[str, ...]) -> str:
    """What keeps the tensors from being those of a network whose state dict is `own`, in one line; empty if they are.

    Those whose name starts with one of `fresh` may be missing.
    """
    problems = [f"no {name}" for name in sorted(own.keys() - given.keys()) if not name.startswith(fresh)]
    problems += [f"{name} is left over" for name in sorted(given.keys() - own.keys())]
    problems += [
        f"{name} is {tuple(given[name].shape)} and should be {tuple(own[name].shape)}"
        for name in sorted(own.keys() & given.keys())
        if own[name].shape != given[name].shape
    ]
    more = f" and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return "; ".join(problems[:SHOWN_PROBLEMS]) + more


def replace_classifier(given: dict[str, Tensor], own: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> list[str]:
    """Take out of `given` the tensors of a classifier that has not the network's classes; their names start with one of `prefixes`."""
    ours, theirs = (_shapes(tensors, prefixes) for tensors in (own, given))
    if ours == theirs:
        return []
    if not theirs:
        return ["the file has no classifier, a new one is drawn"]
    if ours.keys() != theirs.keys():
        for name in theirs:
            del given[name]
        return ["the classifier is another one, a new one is drawn"]
    different = [name for name in ours if ours[name] != theirs[name]]
    if any(ours[name][1:] != theirs[name][1:] for name in different):
        # It reads other features, so the network is another one, and `differences` says in which.
        return []
    for name in different:
        del given[name]
    return [f"classifier replaced ({theirs[different[0]][0]} classes to {ours[different[0]][0]})"]


def said_resampling(name: str, old: Tensor, new: Tensor) -> str:
    """The sentence about a tensor that was resampled to the network's size."""
    if name.endswith("pos_embed"):
        return f"positions resampled ({old.shape[1]} tokens to {new.shape[1]})"
    if name == "patch_embed.proj.weight":
        (*_, height, width), (*_, new_height, new_width) = old.shape, new.shape
        return f"patch embedding resampled ({height}x{width} px to {new_height}x{new_width})"
    return f"{name} adapted ({tuple(old.shape)} to {tuple(new.shape)})"


def _shapes(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(prefixes)}


def _replace_pooling(given: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    ours, theirs = (_shapes(tensors, ("pooling.",)) for tensors in (own, given))
    if ours == theirs:
        return []
    for name in theirs:
        del given[name]
    return ["the pooling is another one and starts anew"]


def _resample_positions(spec: ArchSpec, given: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Resample the positions of every part that learns some: before the first stage, or with the patches that a reduction gives."""
    changes = []
    for part in layout(spec):
        name, shape = f"{part.path}.pos_embed", part.output_shape
        if name not in given or name not in own or given[name].shape == own[name].shape or given[name].shape[-1] != own[name].shape[-1]:
            continue
        from timm.layers.pos_embed import resample_abs_pos_embed

        assert shape.grid is not None
        num_prefix = own[name].shape[1] - shape.num_patches
        num_patches = given[name].shape[1] - num_prefix
        side = math.isqrt(max(0, num_patches))
        if side < 1 or side**2 != num_patches:
            raise SpecError(f"{name} has {given[name].shape[1]} positions: without {num_prefix} of prefix tokens they fill no square grid")
        old = given[name]
        given[name] = resample_abs_pos_embed(old, list(shape.grid), num_prefix_tokens=num_prefix)
        changes.append(said_resampling(name, old, given[name]))
    return changes


def _resample_patches(given: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    name = "patch_embed.proj.weight"
    if name not in given or name not in own:
        return []
    old, size = given[name], own[name].shape
    if old.ndim != 4 or old.shape[:2] != size[:2] or old.shape == size:
        return []
    from timm.layers.patch_embed import resample_patch_embed

    given[name] = resample_patch_embed(old, list(size[2:]))
    return [said_resampling(name, old, given[name])]
