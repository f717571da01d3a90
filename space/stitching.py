"""Several networks stitched into one, whose cost is chosen at every call: `StitchedTransformer`.

Stitchable Neural Networks (v1), https://arxiv.org/abs/2302.06586; SN-Netv2, https://arxiv.org/abs/2307.00154.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from space.component import Tokens
from space.least_squares import AffineMap, LeastSquares, PseudoInverse
from space.model import build_model
from space.randomness import stream
from space.registry import SpecError
from space.spec import ArchSpec
from space.stitch_spec import Connection, Route, Step, StitchSpec, check_anchors, connections, steps
from space.vit import VisionTransformer


class Stitch(nn.Module):
    """An affine map of tokens, `(B, N, in_dim) -> (B, N, out_dim)`.

    With a `rank` it is `(W + B A / rank) x + b`: W is frozen, A `(rank, in_dim)`, B `(out_dim, rank)` and b are trained (SN-Netv2, section
    3.4, with its alpha of 1). B starts at 0, so training starts from W. Without a rank W is trained itself (v1).

    W, A and B are never merged in place: a state dict means the same network whenever it is loaded and in whatever mode. Without gradients
    the sum is computed once and kept, beside the state dict, until one of its tensors changes or the mode is set.
    """

    def __init__(self, in_dim: int, out_dim: int, *, rank: int | None, generator: torch.Generator | None = None):
        super().__init__()
        if rank is not None and rank < 1:
            raise SpecError(f"rank of a stitch is {rank}; a whole number above 0 is expected, or None to train the whole map")
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim), requires_grad=rank is None)
        self.bias = nn.Parameter(torch.zeros(out_dim))
        nn.init.trunc_normal_(self.weight, std=0.02, generator=generator)
        self.down: nn.Parameter | None = None
        self.up: nn.Parameter | None = None
        if rank is not None:
            self.down, self.up = nn.Parameter(torch.empty(rank, in_dim)), nn.Parameter(torch.zeros(out_dim, rank))
            bound = 1 / math.sqrt(in_dim)
            nn.init.uniform_(self.down, -bound, bound, generator=generator)
        self._folded: tuple[tuple[tuple[Tensor, int, int], ...], Tensor] | None = None

    @torch.no_grad()
    def set_map(self, weight: Tensor, bias: Tensor) -> None:
        """Start from an affine map, weight `(out_dim, in_dim)`; what A and B have learned is forgotten."""
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        if self.up is not None:
            self.up.zero_()

    def folded_weight(self) -> Tensor:
        """`W + B A / rank`, `(out_dim, in_dim)`; the very tensor as long as nothing changes, so it must not be written to."""
        if self.down is None or self.up is None:
            return self.weight
        parts = (self.weight, self.down, self.up)
        if any(part.is_inference() for part in parts):
            # Made under `torch.inference_mode`, such tensors count no versions.
            return torch.addmm(self.weight, self.up, self.down, alpha=1 / len(self.down))
        # `data_ptr` tells a move to another device or precision, which no version counts.
        state = tuple((part, part._version, part.data_ptr()) for part in parts)
        if self._folded is None or any(a[0] is not b[0] or a[1:] != b[1:] for a, b in zip(self._folded[0], state, strict=True)):
            self._folded = state, torch.addmm(self.weight, self.up, self.down, alpha=1 / len(self.down)).detach()
        return self._folded[1]

    def train(self, mode: bool = True) -> Stitch:
        # A fused optimizer writes to a tensor without counting a version, and so may an average of weights.
        self._folded = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.down is None or self.up is None:
            return F.linear(x, self.weight, self.bias)
        if not torch.is_grad_enabled():
            return F.linear(x, self.folded_weight(), self.bias)
        self._folded = None
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.down), self.up) / len(self.down)


class StitchedTransformer(nn.Module):
    """Anchors and the stitches between them; a call says which route an image takes.

    `routes` are those that will be asked for: they decide which stitches there are. By `shared` several connections may use one stitch, as
    the pairs of a window do in SN-Net: connections with equal values. Weights of anchors and stitches are a function of `seed` alone.
    """

    def __init__(
        self,
        anchors: Sequence[ArchSpec],
        routes: Iterable[Route],
        *,
        rank: int | None = 64,
        shared: Mapping[Connection, object] | None = None,
        seed: int = 0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        check_anchors(anchors)
        self.specs = tuple(anchors)
        self.anchors = nn.ModuleList(build_model(spec, seed=seed, drop_path=drop_path) for spec in self.specs)
        self.stitches = nn.ModuleDict()
        self._name: dict[Connection, str] = {}
        owner: dict[object, str] = {}
        for connection in sorted({each for route in routes for each in connections(route)}):
            name = "{}_{}_to_{}_{}".format(*connection)
            self._name[connection] = owner.setdefault((shared or {}).get(connection, connection), name)
            if self._name[connection] == name:
                dims = (self.specs[anchor].stages[0].embed_dim for anchor in (connection.from_anchor, connection.to_anchor))
                generator = torch.Generator().manual_seed(stream(seed, "stitch", *connection))
                self.stitches[name] = Stitch(*dims, rank=rank, generator=generator)

    @property
    def connections(self) -> tuple[Connection, ...]:
        """Where there are stitches."""
        return tuple(self._name)

    def stitch(self, connection: Connection) -> Stitch:
        """The stitch at a connection; raises SpecError where there is none."""
        if connection not in self._name:
            raise SpecError(f"there is no stitch from block {connection[:2]} to block {connection[2:]} (anchor, block)")
        found = self.stitches[self._name[connection]]
        assert isinstance(found, Stitch)
        return found

    def forward(self, images: Tensor, route: Route) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, in_chans, img_size, img_size)`; raises SpecError for a route without its stitches."""
        tokens = Tokens(images)
        for step in steps(route):
            tokens = self._taken(step, tokens)
        return tokens.x

    def run(self, tokens: Tokens, anchor: int, first: int, last: int) -> Tokens:
        """Tokens after blocks `first` to `last` of an anchor."""
        for block in self.blocks(anchor)[first : last + 1]:
            tokens, _ = block(tokens)
        return tokens

    def anchor(self, number: int) -> VisionTransformer:
        anchor = self.anchors[number]
        assert isinstance(anchor, VisionTransformer)
        return anchor

    def blocks(self, anchor: int) -> nn.ModuleList:
        return self.anchor(anchor).stages[0].blocks  # type: ignore[return-value]

    @torch.no_grad()
    def extract(self, route: Route) -> VisionTransformer:
        """The network of a route on its own, with copies of its weights, on their device: the one that `StitchSpec.folded` describes."""
        spec = StitchSpec(anchors=self.specs, route=route)
        network = build_model(spec, seed=0).train(self.training)
        assert isinstance(network, VisionTransformer)
        whole = [anchor.state_dict() for anchor in self.anchors]
        tensors = {}
        for name in network.state_dict():
            if (origin := spec.origin(name)) is not None:
                anchor, path = origin
                tensors[name] = whole[anchor][path]
            else:
                stitch = self.stitch(spec.stitch(name))
                tensors[name] = stitch.folded_weight() if name.endswith("weight") else stitch.bias
        network = network.to(next(self.parameters()))
        network.load_state_dict(tensors)
        return network

    def forward_all(self, images: Tensor, routes: Sequence[Route]) -> Iterator[tuple[Route, Tensor]]:
        """Each route once with its logits, equal to those of `forward`, in an order in which what routes have in common runs once.

        Tokens are kept for the routes that still branch off: at most as many tensors `(B, N, C)` as a route has branches. For evaluation.
        """
        trie: dict[Any, Any] = {}
        for route in routes:
            at = trie
            for step in steps(route):
                at = at.setdefault(step, {})
            at[None] = route
        yield from self._descend(trie, Tokens(images))

    def _descend(self, trie: Mapping[Any, Any], tokens: Tokens) -> Iterator[tuple[Route, Tensor]]:
        for step, below in trie.items():
            if step is None:
                yield below, tokens.x
            else:
                yield from self._descend(below, self._taken(step, tokens))

    def _taken(self, step: Step, tokens: Tokens) -> Tokens:
        match step:
            case ("embed", anchor):
                return self.anchor(anchor).embed(tokens.x)
            case ("block", anchor, block):
                return self.run(tokens, anchor, block, block)
            case ("stitch", *connection):
                return tokens._replace(x=self.stitch(Connection(*connection))(tokens.x))
        return Tokens(self.anchor(step[1]).classify(tokens))


@torch.no_grad()
def fit_stitches(stitched: StitchedTransformer, batches: Iterable[Tensor], *, reference: bool = False) -> dict[Connection, AffineMap]:
    """Start every stitch from the least-squares map between the anchors' own tokens, and return these maps.

    A stitch that leads from behind block f of one anchor to before block e of another is fitted to the tokens behind f and those that e
    receives when each anchor runs alone on the same images (SN-Net, section 3.2). A shared stitch takes the mean of its maps. `batches` are
    images `(B, in_chans, img_size, img_size)`, in any number; anchors run in evaluation mode. With `reference` the maps are those of
    SN-Net's released code, found by `PseudoInverse`, which keeps all tokens. Raises ValueError for no batch.
    """
    was_training = stitched.training
    stitched.eval()
    solver = PseudoInverse if reference else LeastSquares
    sums = {connection: _solver_of(solver, stitched, connection) for connection in stitched.connections}
    for images in batches:
        reached = [_tokens_by_block(stitched, anchor, images) for anchor in range(len(stitched.anchors))]
        for connection, one in sums.items():
            one.update(reached[connection.from_anchor][connection.from_block + 1], reached[connection.to_anchor][connection.to_block])
    maps = {connection: one.solve() for connection, one in sums.items()}
    by_stitch: dict[Stitch, list[AffineMap]] = {}
    for connection, found in maps.items():
        by_stitch.setdefault(stitched.stitch(connection), []).append(found)
    for stitch, found in by_stitch.items():
        stitch.set_map(torch.stack([each.weight for each in found]).mean(dim=0), torch.stack([each.bias for each in found]).mean(dim=0))
    stitched.train(was_training)
    return maps


def _solver_of(
    solver: type[LeastSquares] | type[PseudoInverse], stitched: StitchedTransformer, connection: Connection
) -> LeastSquares | PseudoInverse:
    stitch = stitched.stitch(connection)
    out_dim, in_dim = stitch.weight.shape
    return solver(in_dim, out_dim, device=stitch.weight.device)


def _tokens_by_block(stitched: StitchedTransformer, anchor: int, images: Tensor) -> list[Tensor]:
    """What each block of an anchor receives, `(B, N, C)`, and last what the final norm does."""
    tokens = stitched.anchor(anchor).embed(images)
    reached = [tokens.x]
    for block in range(len(stitched.blocks(anchor))):
        tokens = stitched.run(tokens, anchor, block, block)
        reached.append(tokens.x)
    return reached
