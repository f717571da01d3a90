"""Heads: the pooled vector to logits, `(B, C) -> (B, num_classes)`."""

from __future__ import annotations

from torch import Tensor, nn

from space.component import Cost, TokenShape, component


@component("head", "linear")
class LinearHead(nn.Linear):
    """One linear layer."""

    def __init__(self, shape: TokenShape, *, out_dim: int):
        super().__init__(shape.dim, out_dim)

    @staticmethod
    def output_shape(shape: TokenShape, *, out_dim: int) -> TokenShape:
        return TokenShape(out_dim, 1)

    @staticmethod
    def cost(shape: TokenShape, *, out_dim: int) -> Cost:
        return Cost.linear(1, shape.dim, out_dim)


@component("head", "tanh_mlp")
class TanhMlpHead(nn.Module):
    """Linear, tanh, Linear, the hidden layer as wide as the input: the head of As-ViT (https://arxiv.org/abs/2202.11921)."""

    def __init__(self, shape: TokenShape, *, out_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(shape.dim, shape.dim)
        self.fc2 = nn.Linear(shape.dim, out_dim)

    @staticmethod
    def output_shape(shape: TokenShape, *, out_dim: int) -> TokenShape:
        return TokenShape(out_dim, 1)

    @staticmethod
    def cost(shape: TokenShape, *, out_dim: int) -> Cost:
        return Cost.linear(1, shape.dim, shape.dim) + Cost.linear(1, shape.dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).tanh())
