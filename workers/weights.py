"""Weights to start from: a local file in timm's or our layout, checked before any work and read again where it is used."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from space.model import Model
from space.weights import Weights


def weights_from(path: Path, model: Model, name: str = "") -> Weights:
    """The weights in the file `path` for the network of `model`; `path` may be a folder that holds `NAME.safetensors`, .pth, .pt or .bin.

    `name` is what the user calls the model by. Everything is checked here: that the file can be read and holds no code, and that its
    tensors are those of the network, apart from what `load_weights` changes. Raises ValueError in one line.
    """
    raise NotImplementedError


def load_weights(network: nn.Module, model: Model, weights: Weights) -> list[str]:
    """Load the weights into the `network` of `model`; returns what was replaced or resampled, a sentence each.

    A classifier for other classes stays as it was initialised, and so does a pooling that the file does not have. Positions are resampled
    to the network's grid and the patch embedding to its patch size. Raises ValueError if the file is not the one of `weights`.
    """
    raise NotImplementedError
