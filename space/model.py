"""A model of any kind: what it is, how a kind answers for its models, and the questions that the rest of the code asks.

A model is a plain frozen value that names its kind. The kind knows how such a value is read, counted and built. It is one class
in `space/kinds/`, registered by a decorator, and its module is imported when its first model is asked about:

    @model_kind("timm")
    class TimmKind(ModelKind[TimmSpec]):
        ...

Importing this module imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from space.component import Cost
from space.registry import Registry, SpecError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from space.spec import ArchSpec
    from space.state_dicts import Fitted


class Model(Protocol):
    """What a trial can measure: a frozen, hashable value that names one network and can be pickled.

    `kind` is the registered name of its kind and the field `"model"` of its JSON. `digest` is 16 hex digits of the SHA-256 of the
    canonical JSON. Images are `(B, in_chans, img_size, img_size)`, logits `(B, num_classes)`.
    """

    kind: ClassVar[str]

    @property
    def img_size(self) -> int: ...

    @property
    def in_chans(self) -> int: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


M = TypeVar("M", bound=Model)


class ModelKind(ABC, Generic[M]):
    """The contract of a kind: it answers every question about its models. Its module imports torch only inside functions."""

    notation: ClassVar[str | None] = None
    """The word in messages for what a user may type after `KIND:`; a kind without one is read from JSON only."""

    @abstractmethod
    def examples(self) -> tuple[M, ...]:
        """Small models of this kind, of 3 channels or 1 and at most 64 pixels, on which the contract tests run."""

    @abstractmethod
    def from_json(self, data: Mapping[str, Any]) -> M:
        """The model of `to_json`'s object; raises SpecError saying which field is wrong."""

    def read(self, text: str) -> M:
        """The model that a user names by `KIND:text`; raises SpecError saying what is allowed. Called if there is a `notation`."""
        raise SpecError("models of this kind are read from JSON files only")

    @abstractmethod
    def resized(self, model: M, *, img_size: int, num_classes: int) -> M:
        """The same network for images of `img_size` pixels and `num_classes` classes; raises SpecError if there is none."""

    @abstractmethod
    def cost_by_part(self, model: M) -> dict[str, Cost]:
        """The counts for one image of every part, by its path; raises SpecError if the network cannot be built."""

    def cost(self, model: M) -> Cost:
        """The counts of the whole network for one image; a kind that can add them up faster overrides this."""
        return sum(self.cost_by_part(model).values(), Cost())

    @abstractmethod
    def build(self, model: M, *, seed: int, drop_path: float) -> nn.Module:
        """As `build_model`, which has checked `drop_path`."""

    @abstractmethod
    def depth(self, model: M) -> int:
        """As `depth_of`."""

    @abstractmethod
    def token_size(self, model: M) -> int | None:
        """As `token_size`."""

    @abstractmethod
    def why_no_class_row(self, model: M) -> str | None:
        """As `supports_class_row`."""

    def as_arch(self, model: M) -> ArchSpec | None:
        """As `as_arch`."""
        return None

    def fit(self, model: M, tensors: Mapping[str, Tensor], stored: Model | None) -> Fitted:
        """As `fit_tensors`; a kind that does not override this takes the tensors of the very same network."""
        from space.state_dicts import Fitted, differences

        if problems := differences(tensors, self.build(model, seed=0, drop_path=0.0).state_dict(), fresh=()):
            raise SpecError(problems)
        return Fitted(dict(tensors), (), has_classifier=True)

    def normalisation(self, model: M) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation, per channel, of the images that published weights of the model take; None if not known."""
        return None

    def foldable_convolution(self, model: M) -> str | None:
        """The path of the convolution that sees the image first, if it has a bias and pads nothing, else None.

        Only in such a convolution another normalisation of the images can be made up for.
        """
        return None


class KindOfArch(ModelKind[M]):
    """The contract of a kind whose models are networks of our components with an identity of their own, such as parts of larger networks.

    What does not depend on that identity is answered for the network, `as_arch`.
    """

    @abstractmethod
    def as_arch(self, model: M) -> ArchSpec:
        """The network on its own."""

    def cost_by_part(self, model: M) -> dict[str, Cost]:
        return self._kind(model).cost_by_part(self.as_arch(model))

    def cost(self, model: M) -> Cost:
        return self._kind(model).cost(self.as_arch(model))

    def depth(self, model: M) -> int:
        return self._kind(model).depth(self.as_arch(model))

    def token_size(self, model: M) -> int | None:
        return self._kind(model).token_size(self.as_arch(model))

    def why_no_class_row(self, model: M) -> str | None:
        return self._kind(model).why_no_class_row(self.as_arch(model))

    def foldable_convolution(self, model: M) -> str | None:
        return self._kind(model).foldable_convolution(self.as_arch(model))

    def _kind(self, model: M) -> ModelKind[ArchSpec]:
        return kinds.get(self.as_arch(model).kind)


kinds: Registry[ModelKind[Any]] = Registry("model_kind", package="space.kinds")
K = TypeVar("K", bound=ModelKind[Any])


def model_kind(name: str) -> Callable[[type[K]], type[K]]:
    """Register a `ModelKind` class as the kind of the models whose `kind` is `name`."""

    def register(cls: type[K]) -> type[K]:
        kinds.add((name,), cls())
        return cls

    return register


def model_from_json(data: Any) -> Model:
    """The model of a `to_json` object of any kind; raises SpecError saying what is wrong in it."""
    kind = data.get("model") if isinstance(data, Mapping) else None
    if not isinstance(kind, str):
        known = ", ".join(f'"{name}"' for name in kinds.names())
        raise SpecError(f'not the JSON of a model: an object is expected whose "model" is one of {known}')
    if kind not in kinds.names():
        raise unknown_name("kind of model", kind, kinds.names())
    return kinds.get(kind).from_json(data)


def build_model(model: Model, *, seed: int, drop_path: float = 0.0) -> nn.Module:
    """The initialised network on the CPU, in training mode: a pure function of its arguments, global generators untouched.

    In a network of our components every tensor has a stream of its own, named by the seed and the path of its module, so that
    networks which differ in one part share all other initial weights. A timm model is drawn from one stream. `drop_path` is the
    stochastic depth of the last block. Raises SpecError for what cannot be built, and ValueError for a `drop_path` outside [0, 1).
    """
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path is {drop_path!r}; allowed: from 0 to below 1")
    return kinds.get(model.kind).build(model, seed=seed, drop_path=drop_path)


def fit_tensors(model: Model, tensors: Mapping[str, Tensor], stored: Model | None = None) -> Fitted:
    """The tensors of a file, by their names in timm's layout or ours, fitted to the network of `model`; `stored` is theirs, if it is known.

    What may differ is replaced or resampled, and said: the classifier, the pooling, the number of positions and the size of the patches.
    Raises SpecError, in one line, if the tensors are of another architecture.
    """
    return kinds.get(model.kind).fit(model, tensors, stored)


def resized(model: M, *, img_size: int | None = None, num_classes: int | None = None) -> M:
    """The same network at another image size in pixels or with another number of classes; None leaves it as it is."""
    return kinds.get(model.kind).resized(
        model,
        img_size=model.img_size if img_size is None else img_size,
        num_classes=model.num_classes if num_classes is None else num_classes,
    )


def depth_of(model: Model) -> int:
    """Number of blocks; 0 for a timm model that names none."""
    return kinds.get(model.kind).depth(model)


def token_size(model: Model) -> int | None:
    """Pixels along the side of the square that one token of the last stage stands for; None where there is no such grid."""
    return kinds.get(model.kind).token_size(model)


def supports_class_row(model: Model) -> str | None:
    """Why the network cannot give the class token's attention on the grid of patches in its last block; None if it can."""
    return kinds.get(model.kind).why_no_class_row(model)


def as_arch(model: Model) -> ArchSpec | None:
    """The network as one of our components; None if it is not one."""
    return kinds.get(model.kind).as_arch(model)


def require_arch(model: Model, what: str) -> ArchSpec:
    """The network as one of our components; raises SpecError saying that `what` takes no other."""
    arch = as_arch(model)
    if arch is None:
        raise SpecError(f"{what} takes networks of our components; a model of kind {model.kind!r} is none")
    return arch


def decay_exempt(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay.

    They are those of one dimension (norms, biases, exponents of pooling) and those that a module, ours or timm's, names in
    `no_weight_decay` (position tables, class and register tokens).
    """
    ndims = {name: parameter.ndim for name, parameter in model.named_parameters()}
    return {name for name, ndim in ndims.items() if ndim <= 1} | (_named_by(model, "no_weight_decay") & ndims.keys())


def exponent_parameters(model: nn.Module) -> set[str]:
    """Names of the exponents of pooling, which learn at a rate of their own (`Recipe.exponent_lr_scale`)."""
    return _named_by(model, "exponent_parameters")


def _named_by(model: nn.Module, method: str) -> set[str]:
    """The parameters that modules name by `method()`, by their names in the whole model."""
    names: set[str] = set()
    for path, module in model.named_modules():
        if hasattr(module, method):
            names |= {f"{path}.{name}" if path else name for name in getattr(module, method)()}
    return names
