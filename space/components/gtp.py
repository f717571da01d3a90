"""GTP-ViT, "Efficient Vision Transformers via Graph-based Token Propagation", https://arxiv.org/abs/2311.03035."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from space.component import POSITIVE, AttentionColumns, AttentionTap, Choice, Cost, Tokens, TokenShape, component
from space.components.selection import cosine, keep, sizes_of, take
from space.registry import SpecError
from space.spec import Component

NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, "0 or above")
NUM_NEIGHBOURS = 4


@component(
    "token_reduction",
    "gtp",
    choices={
        "P": Choice(offered=(2, 4, 8), allowed=NOT_NEGATIVE),
        "alpha": Choice(offered=(0.1, 0.2, 0.4), default=0.2, allowed=NOT_NEGATIVE),
        "num_neighbours": Choice(offered=(1, 4, 10), default=NUM_NEIGHBOURS, allowed=POSITIVE),
        "graph": Choice(offered=("mixed", "spatial", "semantic"), default="mixed"),
        "scale": Choice(offered=(True, False), default=True),
    },
    attention_tap=AttentionTap.COLUMN_SUMS,
    takes_sizes=True,
)
class GTP(nn.Module):
    """Drop `P` patches, and add to those that stay what their neighbours among the dropped ones held (section 3).

    Patch j scores `max_h A[j, j] max_h sum_i A[i, j]` over the heads h of the attention A ("MixedAttnMax"); the lowest scores go. The
    graph is made once, of the patches that enter the first block that reduces: the eight neighbours on the grid ("spatial"), the
    `num_neighbours` patches of the highest cosine ("semantic"), or both ("mixed"), normalised to `D^-1/2 A D^-1/2` with D the sums of
    rows. A kept patch gains `alpha` times the sum over the dropped ones, weighted by the graph; with `scale` its size gains the same sum
    of their sizes. The paper reduces in every block. Its attention that keeps a share of all entries is not here.
    """

    def __init__(self, shape: TokenShape, *, P: int, alpha: float, num_neighbours: int, graph: str, scale: bool):
        super().__init__()
        self.grid, self.num_prefix, self.num_patches = shape.grid, shape.num_prefix, shape.num_patches
        self.P, self.alpha, self.num_neighbours = P, alpha, num_neighbours
        self.graph, self.scale = graph, scale

    @staticmethod
    def canonical(*, P: int, alpha: float, num_neighbours: int, graph: str, scale: bool) -> Component | None:
        if P == 0:
            return None
        if graph == "spatial":
            num_neighbours = NUM_NEIGHBOURS
        return Component("gtp", P=P, alpha=alpha, num_neighbours=num_neighbours, graph=graph, scale=scale)

    @staticmethod
    def output_shape(shape: TokenShape, *, P: int, alpha: float, num_neighbours: int, graph: str, scale: bool) -> TokenShape:
        if shape.num_patches <= P:
            raise SpecError(f"P is {P}; there are {shape.num_patches} patches, of which one must stay")
        if not shape.memory and graph != "semantic" and shape.grid is None:
            raise SpecError(f"graph {graph!r} needs the patches on a grid, but an earlier part breaks the grid up; use 'semantic'")
        if not shape.memory and graph != "spatial" and num_neighbours >= shape.num_patches:
            raise SpecError(f"num_neighbours is {num_neighbours}; a patch has {shape.num_patches - 1} others")
        return shape._replace(num_patches=shape.num_patches - P, grid=None, has_sizes=shape.has_sizes or scale, memory="gtp")

    @staticmethod
    def cost(shape: TokenShape, *, P: int, alpha: float, num_neighbours: int, graph: str, scale: bool) -> Cost:
        propagation = (shape.num_patches - P) * P * shape.dim
        similarities = 0 if shape.memory or graph == "spatial" else shape.num_patches**2 * shape.dim
        return Cost(fvcore_macs=propagation + similarities)

    def remember(self, x: Tensor) -> Tensor:
        """The normalised graph of the patches, `(B, num_prefix + num_patches, C) -> (B, num_patches, num_patches)`."""
        patches = x[:, self.num_prefix :]
        edges = patches.new_zeros(len(patches), self.num_patches, self.num_patches)
        if self.graph != "spatial":
            itself = torch.eye(self.num_patches, dtype=torch.bool, device=x.device)
            nearest = cosine(patches, patches).masked_fill(itself, -torch.inf).topk(self.num_neighbours, dim=-1).indices
            edges = edges.scatter(2, nearest, 1.0)
        if self.graph != "semantic":
            assert self.grid is not None
            edges = torch.maximum(edges, grid_neighbours(self.grid).to(edges))
        scale = edges.sum(dim=-1).clamp(min=1).rsqrt()
        return scale.unsqueeze(2) * edges * scale.unsqueeze(1)

    def forward(self, tokens: Tokens, received: AttentionColumns) -> Tokens:
        graph = tokens.memory
        assert graph is not None
        score = (received.diagonal.amax(dim=1) * received.sums.amax(dim=1))[:, self.num_prefix :]
        stay, go = score.argsort(dim=1, descending=True, stable=True).split([self.num_patches - self.P, self.P], dim=1)
        kept = keep(tokens._replace(sizes=sizes_of(tokens) if self.scale else tokens.sizes), self.num_prefix, stay)
        rows = take(graph, stay)
        from_dropped = rows.gather(2, go.unsqueeze(1).expand(-1, rows.shape[1], -1))
        among_kept = rows.gather(2, stay.unsqueeze(1).expand(-1, rows.shape[1], -1))
        x = _added(kept.x, self.alpha * (from_dropped @ take(tokens.x[:, self.num_prefix :], go)), self.num_prefix)
        if not self.scale:
            return kept._replace(x=x, memory=among_kept)
        gone = sizes_of(tokens)[:, self.num_prefix :].gather(1, go)
        gained = (from_dropped * gone.unsqueeze(1)).sum(dim=2, keepdim=True)
        sizes = _added(sizes_of(kept).unsqueeze(2), self.alpha * gained, self.num_prefix)
        return Tokens(x, sizes.squeeze(2), among_kept)


def _added(x: Tensor, to_patches: Tensor, num_prefix: int) -> Tensor:
    return torch.cat([x[:, :num_prefix], x[:, num_prefix:] + to_patches], dim=1)


def grid_neighbours(grid: tuple[int, int]) -> Tensor:
    """1 where two places of the grid touch by side or corner, `(height * width, height * width)`; no place touches itself."""
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([row.flatten(), column.flatten()], dim=1)
    return ((places[:, None] - places[None]).abs().amax(dim=-1) == 1).float()
