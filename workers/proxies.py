"""What training-free scores share: the network that is scored, its batch, and what they look at inside of it.

Every score takes the network of `build_model` with the weights of the trial's seed, in evaluation mode: there is no dropout. Only batch
norms normalise by the batch, since the running statistics of an untrained network say nothing. Where a score sums over layers, these are
the `nn.Conv2d` and `nn.Linear` of the network and their weights alone, as in Abdelfattah et al., "Zero-Cost Proxies for Lightweight NAS",
ICLR 2021, https://arxiv.org/abs/2101.08134.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from space.component import Tokens
from space.model import Model, build_model
from space.randomness import stream
from space.registry import SpecError
from space.timm_cost import is_block
from workers.batches import Batch, evaluation_batches
from workers.data import load_images
from workers.evaluator import Context, EvaluationError

CHUNK_PIXELS = 8 * 224 * 224
"""The pixels of all images that share a forward pass: eight images at 224 px, and a batch of 64 whole up to 79 px."""


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How many images a score is taken from; 64 is usual in the literature."""

    batch_size: int = 64

    def __post_init__(self) -> None:
        if type(self.batch_size) is not int or self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size!r}; allowed: whole numbers from 2")


def scored_network(model: Model, context: Context) -> nn.Module:
    """The network of the model on the trial's device, with the initial weights of the trial's seed."""
    network = build_model(model, seed=context.seed).eval()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
        # An activation that overwrites its input would change what a score looks at.
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return network.to(context.device)


def labelled_batches(model: Model, context: Context, *, batch_size: int, num_batches: int = 1) -> list[Batch]:
    """Disjoint batches of training images at the model's size, drawn by the trial's seed; the first images of a longer draw are the same.

    Val and test images are never looked at. Raises SpecError if there are too few images or the network has too few outputs.
    """
    _check_colours(model)
    dataset = context.dataset
    if dataset is None:
        raise SpecError("a score of the loss needs labelled data")
    if dataset.num_classes > model.num_classes:
        raise SpecError(f"data {dataset.source!r} has {dataset.num_classes} classes; the network puts out {model.num_classes}")
    num_images = batch_size * num_batches
    if len(dataset.train) < num_images:
        raise SpecError(f"data {dataset.source!r}: train has {len(dataset.train)} images; the score takes {num_images}")
    drawn = np.random.default_rng(stream(context.seed, "scored images")).permutation(dataset.train)[:num_images]
    batches = evaluation_batches(dataset, drawn, device=context.device, batch_size=batch_size)
    return [Batch(_resized(images, model.img_size), labels) for images, labels in batches]


def unlabelled_batch(model: Model, context: Context, *, batch_size: int) -> Tensor:
    """Images `(B, 3, H, W)` at the model's size, drawn by the trial's seed; damaged ones are named in a warning."""
    _check_colours(model)
    sample = load_images(context.data, img_size=model.img_size, num_images=batch_size, seed=stream(context.seed, "scored images"))
    warn_of_damage(context, sample.skipped)
    return sample.images.to(context.device)


def gaussian_batch(model: Model, context: Context, *, batch_size: int) -> Tensor:
    """Images `(B, in_chans, H, W)` of independent standard normal pixels, drawn by the trial's seed."""
    shape = (batch_size, model.in_chans, model.img_size, model.img_size)
    return torch.randn(shape, generator=generator(context.seed, "gaussian images")).to(context.device)


def generator(*parts: int | str) -> torch.Generator:
    """The random generator of the stream named by `parts`.

    It is always on the CPU: the streams of a device differ from it, and a score should not depend on where it is taken.
    """
    return torch.Generator().manual_seed(stream(*parts))


def warn_of_damage(context: Context, skipped: Iterable[str]) -> None:
    """Tell the trial which files were drawn and could not be read, if there are any."""
    if names := list(skipped):
        context.warn(f"data {context.data!r}: skipped as damaged ({len(names)}): {', '.join(names)}")


@contextmanager
def repeatable(device: str) -> Iterator[None]:
    """Equal calls give equal bits: on a GPU no TensorFloat-32, and no kernel whose sums change from call to call."""
    with ExitStack() as stack:
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False))
        if torch.device(device).type == "cuda":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def in_chunks(network: nn.Module, *batch: Tensor, num_graphs: int = 1) -> Iterator[tuple[Tensor, ...]]:
    """The batch `(B, ...)` in parts that fit the memory, images first; whole if the network normalises over the batch.

    Parts are smaller where a score holds more than one graph of the forward pass.
    """
    over_batch = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    size = len(batch[0]) if over_batch else max(1, CHUNK_PIXELS // (num_graphs * batch[0][0, 0].numel()))
    yield from zip(*(part.split(size) for part in batch), strict=True)


def weighted_layers(network: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    """The layers that a score sums over, in the order of registration."""
    return [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def layer_weights(network: nn.Module) -> list[Tensor]:
    """The weights of the `weighted_layers`; one that layers share is listed once."""
    return list({id(layer.weight): layer.weight for layer in weighted_layers(network)}.values())


def gradients(loss: Tensor, weights: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """The gradient of each weight, zero where the loss does not depend on it."""
    found = torch.autograd.grad(loss, weights, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(weight) if gradient is None else gradient for weight, gradient in zip(weights, found, strict=True)]


def blocks(network: nn.Module, what: str) -> list[nn.Module]:
    """The residual blocks, in their order; raises SpecError saying that `what` is not defined if the network has none."""
    found = [module for path, module in network.named_modules() if is_block(path, module)]
    if not found:
        raise SpecError(f"{what} looks at residual blocks; this network, ours or timm's, names none")
    return found


def tokens_in(carried: Any) -> Any:
    """The tokens in what a block takes or gives: our blocks carry sizes beside them, timm's carry them alone."""
    match carried:
        case Tokens():
            return carried.x
        case (Tokens() as tokens, _):
            return tokens.x
        case _:
            return carried


def with_tokens(carried: Any, x: Tensor) -> Any:
    """What a block takes or gives, with other tokens in it."""
    match carried:
        case Tokens():
            return carried._replace(x=x)
        case (Tokens() as tokens, beside):
            return tokens._replace(x=x), beside
        case _:
            return x


def is_attention(module: nn.Module) -> bool:
    """Whether linear layers of the module lie beside a number of heads."""
    return isinstance(getattr(module, "num_heads", None), int) and any(isinstance(child, nn.Linear) for child in module.children())


def attention_linears(block: nn.Module) -> list[nn.Linear]:
    """The linear layers of the block's attention."""
    return [child for module in block.modules() if is_attention(module) for child in module.children() if isinstance(child, nn.Linear)]


def feed_forward_linears(block: nn.Module) -> list[nn.Linear]:
    """The block's linear layers outside its attention, in the order of registration."""
    of_attention = attention_linears(block)
    return [module for module in block.modules() if isinstance(module, nn.Linear) and all(module is not one for one in of_attention)]


@contextmanager
def watching(modules: Iterable[nn.Module], hook: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """Call `hook(module, inputs, output)` after every forward pass of one of the modules."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def eigenvalues(symmetric: Tensor, what: str) -> Tensor:
    """The eigenvalues of a positive semidefinite matrix, rising, float64, none below 0; raises EvaluationError if it is not finite."""
    if not torch.isfinite(symmetric).all():
        raise EvaluationError("non_finite", f"{what} is not finite")
    return torch.linalg.eigvalsh(symmetric.double()).clamp(min=0)


def _check_colours(model: Model) -> None:
    if model.in_chans != 3:
        raise SpecError(f"in_chans is {model.in_chans}; a score of images takes networks of colour images: 3")


def _resized(images: Tensor, img_size: int) -> Tensor:
    """A network may be scored at another size than it is reported at, for which the data set was read."""
    if images.shape[-1] == img_size:
        return images
    return F.interpolate(images, size=(img_size, img_size), mode="bicubic", antialias=True)
