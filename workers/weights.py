"""Weights to start from: a local file in timm's or our layout, checked before any work and read again where it is used.

A file is a `.safetensors`, a state dict that `torch.load` reads without running code, or the `model.pt` of a training. It is known by the
SHA-256 of its bytes. Our images are normalised by ImageNet's mean and standard deviation. Weights of a network that saw other images are
adjusted in the first convolution, W' = W s / s' and b' = b + sum W (m - m') / s' for our m, s and their m', s': the network then is an
ordinary one, and computes from our images what it computed from its own.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from space.model import Model, fit_tensors, kinds, model_from_json
from space.registry import SpecError
from space.state_dicts import Fitted, is_in_our_layout
from space.weights import SUFFIXES, Weights
from workers.data import IMAGENET_MEAN, IMAGENET_STD
from workers.file_hashes import File, hash_files, stamp_of

CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "weights")
"""Keys under which training code stores a state dict, moving averages first; the last is ours."""

CONFIG, HUB_STEMS = "config.json", ("model", "pytorch_model")
"""As the Hugging Face hub stores a model of timm: its description, input normalisation included, and the names of files it describes."""


def weights_from(path: Path, model: Model, name: str = "") -> Weights:
    """The weights in the file `path` for the network of `model`; `path` may be a folder that holds `NAME.safetensors`, .pth, .pt or .bin.

    `name` is what the user calls the model by. Everything is checked here: that the file can be read and holds no code, and that its
    tensors are those of the network, apart from what `load_weights` changes. Raises ValueError in one line.
    """
    file = find_weights(path, name)
    return _checked(file, model, stamp_of([File("", str(each)) for each in (file, file.with_name(CONFIG)) if each.exists()]))


def load_weights(network: nn.Module, model: Model, weights: Weights) -> list[str]:
    """Load the weights into the `network` of `model`; returns what was replaced or resampled, a sentence each.

    A classifier for other classes stays as it was initialised, and so does another pooling. Positions are resampled to the network's grid
    and the patch embedding to its patch size. Raises ValueError if the file is gone or is not the one of `weights`.
    """
    if not weights.path.is_file():
        raise SpecError(f"weights {weights.path} are gone")
    if (checksum := _checksum(weights.path)) != weights.checksum:
        raise SpecError(f"weights {weights.path} have changed: their sha256 is {checksum[:16]} and was {weights.checksum[:16]}")
    tensors, changes, _ = _fitted(weights.path, _read(weights.path), model)
    if weights.mean is not None and weights.std is not None:
        convolution = kinds.get(model.kind).foldable_convolution(model)
        assert convolution is not None
        _fold_normalisation(tensors, convolution, weights.mean, weights.std)
    network.load_state_dict(tensors, strict=False)
    return list(changes)


def find_weights(path: Path, name: str) -> Path:
    """The file that `path` is, or the one in the folder `path` for the model that the user calls `name`; raises ValueError without one."""
    if path.is_dir():
        stem = Path(name).stem if name.endswith(".json") else name.rpartition(":")[2]
        found = [file for suffix in SUFFIXES if (file := path / f"{stem}{suffix}").is_file()]
        if len(found) != 1:
            there = f"several: {', '.join(file.name for file in found)}" if found else f"no {stem} with {', '.join(SUFFIXES)}"
            raise SpecError(f"weights folder {path}: one file is expected for model {name!r}, and there is {there}")
        return found[0].absolute()
    if not path.is_file():
        raise SpecError(f"weights {path} do not exist; a file ({', '.join(SUFFIXES)}) or a folder of such files is expected")
    if path.suffix not in SUFFIXES:
        raise SpecError(f"weights {path} are of no kind that is read; allowed: {', '.join(SUFFIXES)}")
    return path.absolute()


class _Stored(NamedTuple):
    tensors: dict[str, Tensor]
    spec: Model | None
    """The model whose weights these are, where the file says so: a `model.pt`."""

    @property
    def is_ours(self) -> bool:
        return self.spec is not None or is_in_our_layout(self.tensors)


@lru_cache(maxsize=64)
def _checked(path: Path, model: Model, stamp: str) -> Weights:
    stored = _read(path)
    if damaged := [name for name, tensor in stored.tensors.items() if not torch.isfinite(tensor).all()]:
        raise SpecError(f"weights {path} hold numbers that are not finite: {', '.join(damaged[:3])}")
    fitted = _fitted(path, stored, model)
    weights = Weights(
        checksum=_checksum(path),
        layout="vitscale" if stored.is_ours else "timm",
        path=path,
        has_classifier=fitted.has_classifier,
        changes=fitted.changes,
    )
    return weights if stored.is_ours else _with_normalisation(weights, model)


def _with_normalisation(weights: Weights, model: Model) -> Weights:
    found = _normalisation(weights.path, model)
    if found is None:
        return replace(weights, changes=(*weights.changes, "its input normalisation is not known and taken for ImageNet's"))
    mean, std = found
    if len(mean) == 3 and all(map(math.isclose, (*mean, *std), (*IMAGENET_MEAN, *IMAGENET_STD))):
        return weights
    told = f"input normalisation (mean {_listed(mean)}, std {_listed(std)})"
    if kinds.get(model.kind).foldable_convolution(model) is None or not len(mean) == len(std) == model.in_chans == 3:
        return replace(weights, changes=(*weights.changes, f"its {told} cannot be taken over and images keep ImageNet's"))
    return replace(weights, mean=mean, std=std, changes=(*weights.changes, f"{told} taken over"))


def _normalisation(path: Path, model: Model) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of the images that the weights were trained on; None if neither file nor model says so.

    Said by the `config.json` beside a file of the Hugging Face hub, by a file that is named as timm names its weights,
    `vit_base_patch16_224.mae.pth`, or by the model.
    """
    config = path.with_name(CONFIG)
    if path.stem in HUB_STEMS and config.is_file():
        return _described(config)
    from timm.models import get_pretrained_cfg, is_model

    if is_model(path.stem.partition(".")[0]):
        try:
            named = get_pretrained_cfg(path.stem)
        except RuntimeError:  # a tag that timm does not know
            named = None
        if named is not None:
            return tuple(named.mean), tuple(named.std)
    return kinds.get(model.kind).normalisation(model)


def _described(config: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    try:
        described = json.loads(config.read_text())
        mean, std = (tuple(map(float, described.get("pretrained_cfg", described)[name])) for name in ("mean", "std"))
        if not all(0 < value < math.inf for value in std):
            raise ValueError(f"std is {std}")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise SpecError(f"{config}, beside the weights, says no mean and std of their images: {reason}") from error
    return mean, std


def _fold_normalisation(tensors: dict[str, Tensor], convolution: str, mean: Sequence[float], std: Sequence[float]) -> None:
    ours, theirs = ([torch.tensor(values, dtype=torch.float64) for values in pair] for pair in ((IMAGENET_MEAN, IMAGENET_STD), (mean, std)))
    weight, bias = (tensors[f"{convolution}.{name}"].double() for name in ("weight", "bias"))
    shift = (ours[0] - theirs[0]) / theirs[1]
    tensors[f"{convolution}.bias"] = (bias + (weight.sum(dim=(2, 3)) * shift).sum(dim=1)).float()
    tensors[f"{convolution}.weight"] = (weight * (ours[1] / theirs[1])[:, None, None]).float()


def _listed(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in (values[:1] if len(set(values)) == 1 else values))


def _checksum(path: Path) -> str:
    return hash_files([File(path.name, str(path))])[0]


def _fitted(path: Path, stored: _Stored, model: Model) -> Fitted:
    try:
        return fit_tensors(model, stored.tensors, stored.spec)
    except SpecError as error:
        raise SpecError(f"weights {path} are of another architecture: {error}") from error


def _read(path: Path) -> _Stored:
    """The tensors of a file in float32, and the model of a `model.pt`; raises SpecError in one line for whatever is no file of weights."""
    loaded = _load(path)
    spec = None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("spec"), str):
        try:
            spec = model_from_json(json.loads(loaded["spec"]))
        except ValueError as error:
            raise SpecError(f"weights {path} hold no spec that is read today: {error}") from error
    while isinstance(loaded, Mapping) and (key := next((key for key in CONTAINERS if isinstance(loaded.get(key), Mapping)), None)):
        loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise SpecError(f"weights {path} hold no state dict: tensors by their names, or those under one of {', '.join(CONTAINERS)}")
    from timm.models import clean_state_dict

    tensors = clean_state_dict(dict(loaded))
    return _Stored({name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}, spec)


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols, and a failure is told below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        if objects := _pickled_objects(path, str(error)):
            hint = "which may run code and are not read; save its state dict alone"
            raise SpecError(f"weights {path} hold pickled objects ({objects}), {hint}") from error
        raise SpecError(f"weights {path} are broken, or hold more than tensors") from error
    except Exception as error:  # A damaged file breaks its reader in any way.
        reason = f"{type(error).__name__}: {error}".split("\n")[0].removesuffix(": ")
        raise SpecError(f"weights {path} are broken: {reason}") from error


def _pickled_objects(path: Path, message: str) -> str:
    """The names of what a pickle holds beside tensors, as far as they can be told without running it."""
    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # Only files of today's torch.save are looked into.
        found = re.search(r"GLOBAL ([\w.]+)", message)
        # A name of torch is that of a tensor's parts, cut off where the file ends.
        return found[1] if found and not found[1].startswith("torch.") else ""
