"""As-ViT's two scores of an untrained network: expected length distortion L^E and the condition number of its NTK.

Chen et al., "Auto-scaling Vision Transformers without Training", ICLR 2022, https://arxiv.org/abs/2202.11921; L^E after
Poole et al. 2016, https://arxiv.org/abs/1606.05340. With f the token mean of the last stage before the final norm, all
norms replaced by the identity, and a circle x(a) = u cos a + v sin a of radius 1 (u, v orthonormal images, so about
1 / sqrt(3 H W) per pixel):

    L^E = E_weights  integral |df(x(a)) / da|  da        higher is better
    NTK = lambda_max / lambda_min of  G_ij = < d sum(f(x_i)) / dw, d sum(f(x_j)) / dw >,  norms in place, over the
          parameters w named "weight" that f depends on: the final norm, the head and all biases are left out

The published procedure takes one backward pass for each output feature and angle batch. The derivative is with respect to
one scalar, so a single forward-mode product with dx/da = -u sin a + v cos a gives the same number here.

`mode="reference"` reproduces the published procedure: one batch of images and one draw of the convolutions for all
repeats, angles `linspace(0, 2 pi, num_angles)` with both ends, L^E as the plain sum of speeds over them. Three things
differ: the images are not augmented, the random streams are ours, and a degenerate kernel is a failure instead of -1.

`mode="default"` departs from it in three ways. Every repeat has its own weights, convolutions included, its own curve and its own batch of
images, so that the standard error over repeats means something. The angles do not count 0 = 2 pi twice. L^E is the length of the output
curve over the input's 2 pi, the mean speed, which does not depend on `num_angles` (about a `num_angles`-th of the reference's sum). Each
tensor is drawn from a stream named by (seed, repeat, its place in the network), in both modes: candidates that differ in one stage share
every other tensor, their curves and their images.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from results.records import Metric
from space.model import Model, require_arch
from space.randomness import stream
from space.registry import SpecError
from space.vit import VisionTransformer, build, initialize_by_path
from workers.data import load_images
from workers.evaluator import Context, EvaluationError, evaluator
from workers.proxies import warn_of_damage

CHUNK_PIXELS = 10 * 64 * 64
"""The pixels of all angles that share a forward pass: one angle at 224 px, where memory is scarce, and all ten at 64 px."""

TILE_SCORES = 512 * 512
"""Attention maps above this many entries are taken one head at a time: they then stay in the processor's cache."""

BLOCK_PARAMETERS = 16384
"""Gradients widened to float64 at a time."""

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True, kw_only=True)
class AsVitSettings:
    """How many repeats, angles and images the scores are taken from; the defaults are the paper's."""

    mode: Literal["default", "reference"] = "default"
    num_repeats: int = 5
    ntk_batch_size: int = 16
    num_angles: int = 10

    def __post_init__(self) -> None:
        if self.mode not in ("default", "reference"):
            raise ValueError(f"mode is {self.mode!r}; allowed: default, reference")
        for name, least in (("num_repeats", 2), ("ntk_batch_size", 2), ("num_angles", 2)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}; allowed: whole numbers from {least}")


class Circle(NamedTuple):
    """The input curve x(a) = u cos a + v sin a; u and v are orthonormal images `(3, H, W)`."""

    u: Tensor
    v: Tensor


def speeds(model: VisionTransformer, circle: Circle, angles: Tensor, chunk: int | None = None) -> Tensor:
    """|df(x(a)) / da| at each of the `angles` `(A,)`: `(A,)`, float64, by one forward-mode product per `chunk` of them.

    The model is taken as it is; remove its norms first for L^E.
    """
    u, v = circle
    measured = []
    # Forward mode has no rule for the fused attention kernels, only for the products they are made of.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _TiledAttention():
        for some in angles.split(chunk or max(1, CHUNK_PIXELS // u[0].numel())):
            cos, sin = (part.to(u)[:, None, None, None] for part in (some.cos(), some.sin()))
            velocity = torch.func.jvp(lambda x: features(model, x), (u * cos + v * sin,), (v * cos - u * sin,))[1]
            measured.append(torch.linalg.vector_norm(velocity.double(), dim=1))
    return torch.cat(measured)


def ntk_gram(model: VisionTransformer, images: Tensor) -> Tensor:
    """G `(N, N)`, float64, of images `(N, 3, H, W)`: one backward pass per image alone, summed layer by layer.

    Holds N gradients, 4 N bytes per parameter.
    """
    weights = [parameter for name, parameter in model.named_parameters() if "weight" in name]
    # CUDA's fused attention kernels sum their gradients in no fixed order.
    with sdpa_kernel(SDPBackend.MATH) if images.is_cuda else nullcontext():
        gradients = [torch.autograd.grad(features(model, image).sum(), weights, allow_unused=True) for image in images.split(1)]
    gram = torch.zeros(len(images), len(images), dtype=torch.float64, device=images.device)
    for per_image in zip(*gradients, strict=True):
        if per_image[0] is not None:
            for pieces in zip(*(gradient.flatten().split(BLOCK_PARAMETERS) for gradient in per_image), strict=True):
                block = torch.stack(pieces).double()
                gram += block @ block.T
    return gram


def condition_number(gram: Tensor) -> float:
    """lambda_max / lambda_min; raises EvaluationError if it does not exist or lies below the rounding of the gradients."""
    if not torch.isfinite(gram).all():
        raise EvaluationError("non_finite", "the NTK is not finite: gradients overflow")
    eigenvalues = torch.linalg.eigvalsh(gram)
    smallest, largest = eigenvalues[0].item(), eigenvalues[-1].item()
    # The float32 gradients are known to eps, and eigenvalues of G are squares of their singular values.
    if smallest <= (len(gram) * torch.finfo(torch.float32).eps) ** 2 * largest:
        raise EvaluationError("rank_deficient", f"the NTK of {len(gram)} images is singular: eigenvalues {smallest:.2e} to {largest:.2e}")
    return largest / smallest


def features(model: VisionTransformer, images: Tensor) -> Tensor:
    """f: `(B, 3, H, W) -> (B, C)`, the mean over all tokens of the last stage, before the final norm."""
    return model.forward_tokens(images).mean(dim=1)


class _TiledAttention(TorchFunctionMode):
    """Computes large attention maps on the CPU one head of one window at a time: under half the time, and less memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and len(args) == 3 and not kwargs:
            q, k, v = args
            if q.is_cpu and q.shape[-2] * k.shape[-2] >= TILE_SCORES:
                heads = zip(*(part.flatten(0, -3).unbind(0) for part in (q * q.shape[-1] ** -0.5, k, v)), strict=True)
                return torch.stack([(one_q @ one_k.T).softmax(dim=-1) @ one_v for one_q, one_k, one_v in heads]).view(*q.shape[:-1], -1)
        return func(*args, **(kwargs or {}))


def remove_norms(model: nn.Module) -> None:
    """Replace every norm of the model by the identity."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NORMS):
                setattr(module, name, nn.Identity())


def draw_weights(model: VisionTransformer, seed: int, repeat: int, *, share_convolutions: bool = False) -> None:
    """Draw every parameter anew from a stream named by the place of its module in the network.

    With `share_convolutions` those are the same in all repeats.
    """

    def generator_of(path: str, module: nn.Module) -> torch.Generator:
        is_shared = share_convolutions and isinstance(module, nn.Conv2d)
        return _generator(seed, 0 if is_shared else repeat, path)

    initialize_by_path(model, generator_of)


def draw_circle(seed: int, repeat: int, img_size: int) -> Circle:
    """An orthonormal pair of Gaussian images by Gram-Schmidt, which spans a uniformly random plane."""
    u, v = torch.randn(2, 3, img_size, img_size, generator=_generator(seed, repeat, "circle"), dtype=torch.float64)
    u = u / u.norm()
    v = v - (u * v).sum() * u
    return Circle(u.float(), (v / v.norm()).float())


def draw_angles(settings: AsVitSettings) -> Tensor:
    """The `num_angles` points of the curve, radians, float64."""
    if settings.mode == "reference":
        return torch.linspace(0, 2 * math.pi, settings.num_angles, dtype=torch.float64)
    return torch.arange(settings.num_angles, dtype=torch.float64) * (2 * math.pi / settings.num_angles)


@evaluator(
    "as_vit",
    metrics=(
        Metric("length_distortion", "maximize", "expected length distortion L^E of a circle, norms removed"),
        Metric("length_distortion_stderr", "minimize", "its standard error over the repeats"),
        Metric("ntk_condition", "minimize", "condition number of the neural tangent kernel, mean over the repeats"),
        Metric("ntk_condition_stderr", "minimize", "its standard error over the repeats"),
    ),
    settings=AsVitSettings,
    subject="proxy",
    uses_data=True,
    memory_mb=1200,
)
def as_vit(model: Model, context: Context, settings: AsVitSettings) -> Mapping[str, float]:
    """Training-free scores of As-ViT: expected length distortion and NTK condition number."""
    if model.in_chans != 3:
        raise SpecError(f"in_chans is {model.in_chans}; as_vit scores networks of colour images: 3")
    model = require_arch(model, "as_vit")
    is_reference = settings.mode == "reference"
    skipped: dict[str, None] = {}
    scores: dict[str, list[float]] = {"length_distortion": [], "ntk_condition": []}
    # A generator of its own: without one, the weights that are about to be replaced come out of the caller's global stream.
    blank = build(model, generator=torch.Generator()).eval()
    for repeat in range(settings.num_repeats):
        network = copy.deepcopy(blank)
        draw_weights(network, context.seed, repeat, share_convolutions=is_reference)
        network.to(context.device)
        sample = load_images(
            context.data,
            img_size=model.img_size,
            num_images=settings.ntk_batch_size,
            seed=stream(context.seed, 0 if is_reference else repeat, "images"),
        )
        skipped |= dict.fromkeys(sample.skipped)
        # On a GPU: no TensorFloat-32, which has three digits, and no kernel whose sums change from call to call.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            scores["ntk_condition"].append(condition_number(ntk_gram(network, sample.images.to(context.device))))
            scores["length_distortion"].append(_length_distortion(network, context, settings, repeat, model.img_size))
        for name, values in scores.items():
            context.report(name, values[-1], repeat)
    warn_of_damage(context, skipped)
    return {
        name: value
        for score, values in scores.items()
        for name, value in ((score, sum(values) / len(values)), (f"{score}_stderr", _standard_error(values)))
    }


def _length_distortion(network: VisionTransformer, context: Context, settings: AsVitSettings, repeat: int, img_size: int) -> float:
    remove_norms(network)
    circle = Circle(*(part.to(context.device) for part in draw_circle(context.seed, repeat, img_size)))
    measured = speeds(network, circle, draw_angles(settings).to(context.device))
    length_distortion = (measured.sum() if settings.mode == "reference" else measured.mean()).item()
    if not math.isfinite(length_distortion):
        raise EvaluationError("non_finite", f"length_distortion is {length_distortion} in repeat {repeat}")
    return length_distortion


def _standard_error(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _generator(seed: int, repeat: int, name: str) -> torch.Generator:
    # Always on the CPU: the streams of a device differ from it, and a score should not depend on where it is taken.
    return torch.Generator().manual_seed(stream(seed, repeat, name))
