"""MeCo, W-PCA and head confidence: scores of one forward pass. Each is defined for other networks, so each is an evaluator of its own.

MeCo: Jiang et al., "MeCo: Zero-Shot NAS with One Data and Single Forward Pass via Minimum Eigenvalue of Correlation", NeurIPS 2023. For
one Gaussian image, with P_l the Pearson correlations of the channels of what layer l (`workers.proxies`) puts out, over its positions,
pixels or tokens,

    meco = sum_l smallest eigenvalue of P_l

A constant channel is left out. The correlations of c channels over n positions have a rank below n, since channels are centred, and no
layer puts out more independent channels than it has inputs. So P_l is singular, and its layer counts 0, unless c < n and c is at most the
number of inputs (of a convolution: those of its kernel, in all groups). A network without such a layer is refused before any work. A
Vision Transformer has one only where its tokens outnumber its width: at 224 px and patches of 16 pixels, a width of at most 196. There the
patch embedding, the projections of attention and the second layers of the feed-forwards count, and all layers that widen count 0.

Unsure: the paper makes no claim for transformers. The authors' code also looks at modules that contain others, and takes the first
dimension behind the batch for channels, which in a transformer are tokens. Their variant MeCo_opt takes 8 random channels of each layer,
times c / 8. It would be defined for more networks, but it is another score and is not measured.

W-PCA: Wang, "W-PCA Based Gradient-Free Proxy for Efficient Search of Lightweight Language Models", ICLR 2025,
https://arxiv.org/abs/2504.15983. With k_l the least number of principal components, over all tokens of all images, that hold more than a
share of the variance of what the first linear layer of the feed-forward of block l puts out,

    w_pca = (number of parameters) sum_l k_l

Undefined for networks without blocks that hold a linear layer outside their attention. Unsure of the share: 0.9 is that of the authors'
code for MobileBERT.

Head confidence: Voita et al. 2019, https://arxiv.org/abs/1905.09418, of a head: the mean of its largest attention weight; as a score of
networks Serianni and Kalita 2023, https://arxiv.org/abs/2306.00288. With A_l the attention maps of layer l after the softmax,

    head_confidence = sum_l mean over images, heads and queries i of  max_j A_l(i, j)

Undefined for networks that do not call PyTorch's `scaled_dot_product_attention`. Unsure: how the heads of a network are combined; the mean
over heads and the sum over layers are our reading. Divided by the depth it is the mean. Voita et al. leave the end of a sentence out; here
every token counts, the class token too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from results.records import Metric
from space.model import Model, build_model
from space.recipe import Recipe
from space.registry import SpecError
from workers.evaluator import Context, EvaluationError, NoSettings, evaluator
from workers.proxies import (
    BatchSettings,
    blocks,
    eigenvalues,
    feed_forward_linears,
    gaussian_batch,
    in_chunks,
    is_attention,
    repeatable,
    scored_network,
    unlabelled_batch,
    watching,
    weighted_layers,
)


@dataclass(frozen=True, kw_only=True)
class WPcaSettings(BatchSettings):
    """How many images, and the share of the variance that the counted components hold."""

    share: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"share is {self.share!r}; allowed: above 0 and below 1")


def check_meco(model: Model, recipe: Recipe | None, settings: NoSettings) -> None:
    """Raise SpecError for a network whose correlations are all singular, by the shapes of its layers alone."""
    found: list[tuple[int, int, int]] = []
    # An ordinary forward pass: on the meta device, where shapes are all there is, poolings that look at values cannot run.
    network, image = build_model(model, seed=0).eval(), gaussian_batch(model, Context(seed=0), batch_size=1)
    with torch.no_grad(), watching(weighted_layers(network), lambda layer, _, output: found.append(_dimensions(layer, output))):
        network(image)
    if not any(map(_may_be_regular, found)):
        positions = max(positions for _, positions, _ in found)
        channels = min(channels for channels, seen, _ in found if seen == positions)
        raise SpecError(
            "meco is 0 here whatever the weights: no layer has fewer channels than positions (pixels or tokens) and as many inputs; "
            f"the layers of most positions, {positions}, have {channels} channels or more. A larger image has more positions"
        )


def _dimensions(layer: nn.Conv2d | nn.Linear, output: Tensor) -> tuple[int, int, int]:
    """Channels, positions of one image, and inputs: of a convolution those of its kernel, summed over its groups."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, output[0, 0].numel(), layer.groups * layer.weight[0].numel()
    return layer.out_features, output.numel() // layer.out_features, layer.in_features


def _may_be_regular(dimensions: tuple[int, int, int]) -> bool:
    """Whether correlations of such a layer need not be singular; a single channel has none."""
    channels, positions, inputs = dimensions
    return 2 <= channels < positions and channels <= inputs


@torch.no_grad()
def meco_score(network: nn.Module, image: Tensor) -> float:
    """meco of an image `(1, in_chans, H, W)`, in float64; raises EvaluationError if no layer has independent channels."""
    smallest: list[float] = []

    def see(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        channels = output[0].flatten(1) if isinstance(layer, nn.Conv2d) else output.reshape(-1, output.shape[-1]).T
        channels = channels[(channels != channels[:, :1]).any(dim=1)]
        if 2 <= len(channels) < channels.shape[1]:
            spectrum = eigenvalues(torch.corrcoef(channels), "the correlation matrix of a layer's channels")
            # A singular matrix has a smallest eigenvalue of rounding.
            if spectrum[0] > len(channels) * torch.finfo(torch.float64).eps * spectrum[-1]:
                smallest.append(spectrum[0].item())

    # One image has no statistics of a batch: batch norms take their initial ones, the identity.
    network = copy.deepcopy(network).double().eval()
    with watching(weighted_layers(network), see):
        network(image.double())
    if not smallest:
        raise EvaluationError("rank_deficient", "the channels of every layer depend on each other: all smallest eigenvalues are 0")
    return sum(smallest)


@torch.no_grad()
def w_pca_score(network: nn.Module, images: Tensor, share: float) -> float:
    """w_pca of images `(B, 3, H, W)`; raises SpecError for a network without feed-forward layers."""
    first_linears = [linears[0] for block in blocks(network, "w_pca") if (linears := feed_forward_linears(block))]
    if not first_linears:
        raise SpecError("w_pca counts components in feed-forwards of linear layers; the blocks of this network, ours or timm's, have none")
    moments = {layer: Moments(layer.out_features, images.device) for layer in first_linears}
    with watching(first_linears, lambda layer, _, output: moments[layer].add(output)):
        for (some,) in in_chunks(network, images):
            network(some)
    num_components = sum(of_layer.num_components(share) for of_layer in moments.values())
    return float(sum(parameter.numel() for parameter in network.parameters()) * num_components)


class Moments:
    """The covariance of channels over rows that come in parts, float64."""

    def __init__(self, num_channels: int, device: torch.device):
        self._num_rows = 0
        self._sum = torch.zeros(num_channels, dtype=torch.float64, device=device)
        self._products = torch.zeros(num_channels, num_channels, dtype=torch.float64, device=device)

    def add(self, output: Tensor) -> None:
        """Rows `(..., C)`"""
        rows = output.reshape(-1, output.shape[-1]).double()
        self._num_rows += len(rows)
        self._sum += rows.sum(dim=0)
        self._products += rows.T @ rows

    def num_components(self, share: float) -> int:
        """The least number of principal components that hold more than `share` of the variance; 0 if there is none."""
        mean = self._sum / self._num_rows
        covariance = self._products / self._num_rows - torch.outer(mean, mean)
        held = eigenvalues(covariance, "the covariance of a feed-forward").flip(0).cumsum(0)
        return int((held <= share * held[-1]).sum()) + 1 if held[-1] > 0 else 0


@torch.no_grad()
def head_confidence_score(network: nn.Module, images: Tensor) -> float:
    """head_confidence of images `(B, 3, H, W)`; raises SpecError for attention outside of `scaled_dot_product_attention`."""
    total = 0.0
    num_attending = sum(is_attention(module) for module in network.modules())
    for (some,) in in_chunks(network, images):
        with _LargestWeights() as seen:
            network(some)
        if len(seen.means) < max(1, num_attending):
            told = f"{len(seen.means)} of the {num_attending} attentions of this network, ours or timm's, call it"
            if num_attending == 0:
                told = "this network, ours or timm's, has no attention"
            raise SpecError(f"head_confidence reads scaled_dot_product_attention; {told}")
        total += sum(seen.means) * len(some) / len(images)
    return total


class _LargestWeights(TorchFunctionMode):
    """Records the mean over images, heads and queries of the largest attention weight, for each attention that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.means: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.means.append(_largest_weights(*args, **(kwargs or {})).double().mean().item())
        return func(*args, **(kwargs or {}))


def _largest_weights(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any) -> Tensor:
    """`(..., N, D), (..., M, D) -> (..., N)`, the largest of each query's attention weights."""
    scale = options.get("scale")
    logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(dim=-1).amax(dim=-1)


@evaluator(
    "meco",
    metrics=(Metric("meco", "maximize", "MeCo: smallest eigenvalues of the channels' correlations, summed over layers"),),
    check=check_meco,
    subject="proxy",
    memory_mb=1000,
)
def meco(model: Model, context: Context, settings: NoSettings) -> Mapping[str, float]:
    """MeCo: how far the channels of each layer are from depending on each other, for one Gaussian image."""
    image = gaussian_batch(model, context, batch_size=1)
    with repeatable(context.device):
        return {"meco": meco_score(scored_network(model, context), image)}


@evaluator(
    "w_pca",
    metrics=(Metric("w_pca", "maximize", "W-PCA: parameters times principal components of the feed-forwards"),),
    settings=WPcaSettings,
    subject="proxy",
    uses_data=True,
    memory_mb=1500,
)
def w_pca(model: Model, context: Context, settings: WPcaSettings) -> Mapping[str, float]:
    """W-PCA: the number of parameters times that of principal components in the feed-forward layers."""
    images = unlabelled_batch(model, context, batch_size=settings.batch_size)
    with repeatable(context.device):
        return {"w_pca": w_pca_score(scored_network(model, context), images, settings.share)}


@evaluator(
    "head_confidence",
    metrics=(Metric("head_confidence", "maximize", "largest attention weight of a query, mean over heads, summed over layers"),),
    settings=BatchSettings,
    subject="proxy",
    uses_data=True,
    memory_mb=1500,
)
def head_confidence(model: Model, context: Context, settings: BatchSettings) -> Mapping[str, float]:
    """Head confidence: how much of its attention a query gives to a single token."""
    images = unlabelled_batch(model, context, batch_size=settings.batch_size)
    with repeatable(context.device):
        return {"head_confidence": head_confidence_score(scored_network(model, context), images)}
