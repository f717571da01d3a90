"""A supernet: one resident set of weights of full size, in which every subnet of its network runs.

ViT-ResNAS, https://arxiv.org/abs/2109.00642, section 3: the weights of a subnet are the first entries of the full ones along every
dimension. The paper masks activations of full size; here a subnet is the network of its own spec on slices of the weights, so what it
leaves out costs nothing. Slices are views, save where a fused dimension forces a copy. Their gradients are added to their places in the
gradients of the full weights: autograd's own backward of a slice would make a tensor of zeros of full size for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.weak import WeakTensorKeyDictionary

from space.component import declaration
from space.layout import Part
from space.model import build_model
from space.registry import SpecError
from space.slicing import Slice, subnet_slices, subnet_tensors
from space.spec import ArchSpec
from space.subnet_spec import SubnetSpec
from space.vit import VisionTransformer, build_seeded, drop_path_rates

STEM = "patch_embed"


class Supernet(nn.Module):
    """The network of `spec`, called with images `(B, in_chans, H, W)` and the subnet that runs: logits `(B, num_classes)`.

    Several subnets in one step share the run of the stem, where it declares that its output may be sliced:

        embedded = supernet.embed(images)
        outputs = [supernet.run(embedded[k::K], subnet) for k, subnet in enumerate(subnets)]

    A block has the drop path that it has in the full network, whatever is left out before it. Gradients arrive in the parameters of
    `network` by `backward`, not by `torch.autograd.grad`; a parameter that no subnet used keeps the gradient None, and the unused part
    of one that was used has zeros. The memory of a gradient is used again after it was set to None.

    Raises SpecError for a network with batch statistics that would depend on the subnets that a step takes: only those in a stem that is
    run for all subnets at once are the same for each.
    """

    def __init__(self, spec: ArchSpec, *, seed: int = 0, drop_path: float = 0.0, network: VisionTransformer | None = None):
        """The network with fresh weights, those that `build_model` gives it; or the given one, which must be that of `spec`."""
        super().__init__()
        self.spec = spec
        self.shares_stem: bool = declaration(STEM, spec.patch_embed.name).slices_output
        self.drop_path_rates = drop_path_rates(spec.depth, drop_path)
        self.network = network or build_seeded(spec, seed=seed, drop_path=drop_path)
        for path, module in self.network.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not (self.shares_stem and path.startswith(f"{STEM}.")):
                raise SpecError(
                    f"a supernet cannot hold the batch statistics of {path}: they depend on the subnets of a step, and belong to none; "
                    f"a stem that slices its output may have such a norm, or take layer_norm"
                )

    def forward(self, images: Tensor, subnet: SubnetSpec, **asked: Any) -> Any:
        """What the network of the subnet gives for the images; `asked` are keywords of its forward, such as `with_class_row`."""
        return self._call(images, subnet, asked, with_stem=True)

    def embed(self, images: Tensor) -> Tensor:
        """What `run` takes: the stem's tokens `(B, N, C)` at full width if all subnets share it, else the images."""
        return self.network.patch_embed(images) if self.shares_stem else images

    def run(self, embedded: Tensor, subnet: SubnetSpec, **asked: Any) -> Any:
        """As `forward`, from what `embed` gave."""
        if self.shares_stem:
            embedded = embedded[..., : subnet.arch.stages[0].embed_dim]
        return self._call(embedded, subnet, asked, with_stem=not self.shares_stem)

    def at(self, subnet: SubnetSpec) -> nn.Module:
        """The subnet as a network on this supernet's weights: images to logits."""
        return _At(self, subnet)

    def extract(self, subnet: SubnetSpec) -> VisionTransformer:
        """The subnet as an ordinary network with weights of its own, in the mode and on the device of the supernet."""
        self._check(subnet)
        network = build_model(subnet, seed=0)
        assert isinstance(network, VisionTransformer)
        network.load_state_dict(subnet_tensors(subnet, self.network.state_dict()))
        return network.to(next(self.parameters()).device).train(self.training)

    def _call(self, x: Tensor, subnet: SubnetSpec, asked: Mapping[str, Any], *, with_stem: bool) -> Any:
        self._check(subnet)
        network = _without_weights(subnet, with_stem, self.drop_path_rates, str(x.device)).train(self.training)
        own = dict(chain(self.network.named_parameters(), self.network.named_buffers()))
        slices = (each for each in subnet_slices(subnet) if with_stem or not each.name.startswith(f"{STEM}."))
        return functional_call(
            network, {each.name: borrowed(each, own[each.origin]) for each in slices}, (x,), dict(asked), tie_weights=False
        )

    def _check(self, subnet: SubnetSpec) -> None:
        if subnet.supernet != self.spec:
            raise SpecError(
                f"the subnet is cut out of another supernet: {first_difference(subnet.supernet.to_json(), self.spec.to_json())}"
            )


class _At(nn.Module):
    def __init__(self, supernet: Supernet, subnet: SubnetSpec):
        super().__init__()
        self.supernet, self.subnet = supernet, subnet

    def forward(self, images: Tensor, **asked: Any) -> Any:
        return self.supernet(images, self.subnet, **asked)


def supernet_from_tensors(spec: ArchSpec, tensors: Mapping[str, Tensor]) -> Supernet:
    """The supernet, in evaluation mode, whose weights are these very tensors, the state dict of its network; nothing is copied.

    Raises SpecError naming what differs if they are the tensors of another network.
    """
    device = str(next(iter(tensors.values())).device)
    network = VisionTransformer(spec, make=lambda part: _new_meta_module(part, device))
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if given != expected:
        raise SpecError(f"the tensors are of another network: {first_difference(given, expected)}")
    network.load_state_dict(tensors, assign=True)
    return Supernet(spec, network=network).requires_grad_(False).eval()


def first_difference(given: Any, expected: Any, where: str = "") -> str:
    """Where two JSON values differ first, and how: `stages[1].embed_dim is 48, not 64`; "" if they do not."""
    if isinstance(given, Mapping) and isinstance(expected, Mapping):
        dot = f"{where}." if where else ""
        names = [*expected, *(name for name in given if name not in expected)]
        pairs = ((f"{dot}{name}", given.get(name, "missing"), expected.get(name, "missing")) for name in names)
    elif isinstance(given, list | tuple) and isinstance(expected, list | tuple) and len(given) == len(expected):
        pairs = ((f"{where}[{index}]", *pair) for index, pair in enumerate(zip(given, expected, strict=True)))
    elif isinstance(given, list) and isinstance(expected, list) and any(isinstance(each, Mapping | list) for each in [*given, *expected]):
        return f"{where} has {len(given)} entries, not {len(expected)}"
    else:
        return "" if given == expected else f"{where} is {given}, not {expected}"
    return next((found for place, one, other in pairs if (found := first_difference(one, other, place))), "")


def borrowed(where: Slice, full: Tensor) -> Tensor:
    """The slice of a full tensor as a leaf that gives its gradient back to the place in the full one's; or the full one, if it is whole."""
    if where.is_whole:
        return full
    part = where.read(full.detach())
    if not (full.requires_grad and torch.is_grad_enabled()):
        return part

    def give_back(leaf: Tensor) -> None:
        assert leaf.grad is not None
        if full.grad is None:
            full.grad = _zero_gradient(full)
        where.add(full.grad, leaf.grad)
        leaf.grad = None

    part.requires_grad_().register_post_accumulate_grad_hook(give_back)
    return part


_gradients: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()


def _zero_gradient(full: Tensor) -> Tensor:
    """Zeros for the gradient of a parameter, in memory that it keeps from step to step.

    The pages of new memory cost more than the zeros: 112 ms of CPU time against 16 for 85 M weights.
    """
    kept = _gradients.get(full)
    if kept is not None and kept.device == full.device:
        return kept.zero_()
    _gradients[full] = torch.zeros_like(full)
    return _gradients[full]


@lru_cache(maxsize=256)
def _without_weights(subnet: SubnetSpec, with_stem: bool, rates: tuple[float, ...], device: str) -> VisionTransformer:
    """The network of a subnet on the meta device. Its modules are shared with other subnets of the same supernet."""

    def make(part: Part) -> nn.Module:
        if part.path == STEM and not with_stem:
            return nn.Identity()
        return _meta_module(part._replace(path=subnet.origin(part.path)), device)

    return VisionTransformer(subnet.arch, drop_path=tuple(_rates_of(subnet, rates)), make=make)


def _rates_of(subnet: SubnetSpec, rates: tuple[float, ...]) -> Iterator[float]:
    first = 0
    for stage, kept in zip(subnet.supernet.stages, subnet.kept, strict=True):
        yield from (rates[first + block] for block in kept)
        first += len(stage.blocks)


@lru_cache(maxsize=16384)
def _meta_module(part: Part, device: str) -> nn.Module:
    """`_new_meta_module`, one for each path, since a network must not hold one module in two places."""
    return _new_meta_module(part, device)


def _new_meta_module(part: Part, device: str) -> nn.Module:
    """The module of a part without weights; what it computes from its shape, such as the table of fixed positions, is on the device."""
    # What is cached must not be made for inference alone, where a first caller may be.
    with torch.inference_mode(False), torch.device("meta"):
        module = part.module()
    if computed := dict(module.named_buffers()).keys() - module.state_dict().keys():
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            built = part.module().to(device)
        for name in computed:
            path, _, own = name.rpartition(".")
            module.get_submodule(path).register_buffer(own, built.get_buffer(name), persistent=False)
    return module
