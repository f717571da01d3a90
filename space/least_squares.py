"""An affine map fitted to any number of batches by least squares, in memory that does not grow with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEPENDENT = 1e-10
"""A column is called dependent if the columns before it explain all but this share of its mean square."""
NUM_REFINEMENTS = 3


@dataclass(frozen=True)
class AffineMap:
    """`y = weight x + bias`, in float64: weight `(out_dim, in_dim)`, bias `(out_dim,)`.

    `residual` is the mean square of what the map leaves of y, relative to the variance of y. `num_dependent` inputs, the constant included,
    are linear combinations of others, or more of them: above 0 other maps fit as well, and this one is small where the data say nothing.
    """

    weight: Tensor
    bias: Tensor
    residual: float
    num_dependent: int


class LeastSquares:
    """Sums over rows (x, y) from which the best affine map from x to y follows: `[x 1]ᵀ[x 1]`, `[x 1]ᵀy` and `yᵀy`, in float64.

    `sums` of several processes may be added up, for instance by an all-reduce: that is the whole state. The map is solved for by Cholesky,
    the columns scaled to equal length first, so that a channel 500 times larger than the others leaves them their say. A pseudo-inverse in
    float32 with its usual cutoff drops them: the cutoff grows with the number of rows.
    """

    def __init__(self, in_dim: int, out_dim: int, *, device: torch.device | str = "cpu"):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.gram = zeros(in_dim + 1, in_dim + 1)
        self.products = zeros(in_dim + 1, out_dim)
        self.squares = zeros(out_dim)

    @property
    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gram, self.products, self.squares

    @property
    def num_rows(self) -> int:
        return int(self.gram[-1, -1])

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Add the rows of x `(..., in_dim)` and y `(..., out_dim)`."""
        x, y = (each.reshape(-1, each.shape[-1]).to(self.gram.dtype) for each in (x, y))
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.gram.addmm_(x.T, x)
        self.products.addmm_(x.T, y)
        self.squares.add_(y.square().sum(dim=0))

    @torch.no_grad()
    def solve(self) -> AffineMap:
        """The map of least squared error; raises ValueError without any row, or for sums that are not finite."""
        if self.num_rows == 0:
            raise ValueError("least squares of no rows at all")
        if not all(bool(each.isfinite().all()) for each in self.sums):
            raise ValueError("least squares of rows that are not finite")
        size = len(self.gram)
        lengths = self.gram.diagonal().sqrt()
        scale = torch.where(lengths > 0, 1 / lengths, 0.0)
        gram, products = self.gram * scale * scale[:, None], self.products * scale[:, None]
        ridge = size * torch.finfo(gram.dtype).eps
        factor, num_dependent = _factor(gram, ridge)
        num_dependent = max(num_dependent, size - self.num_rows)
        if num_dependent:
            # Where the data do not decide, rounding would: a ridge above it keeps those directions small.
            factor, _ = _factor(gram, DEPENDENT * 100)
            solution = torch.cholesky_solve(products, factor)
        else:
            solution = torch.zeros_like(products)
            for _ in range(1 + NUM_REFINEMENTS):
                solution += torch.cholesky_solve(products - gram @ solution, factor)
        solution *= scale[:, None]
        left = self.squares - (2 * self.products * solution).sum(dim=0) + (solution * (self.gram @ solution)).sum(dim=0)
        variance = self.squares - self.products[-1].square() / self.num_rows
        residual = float(left.clamp(min=0).sum() / variance.sum().clamp(min=torch.finfo(variance.dtype).tiny))
        return AffineMap(solution[:-1].T.contiguous(), solution[-1].clone(), residual, num_dependent)


def _factor(gram: Tensor, ridge: float) -> tuple[Tensor, int]:
    """The lower Cholesky factor of `gram + ridge`, and the number of dependent columns; an input that is always 0 is one."""
    size = len(gram)
    unit = torch.eye(size, dtype=gram.dtype, device=gram.device)
    factor, failed_at = torch.linalg.cholesky_ex(gram + ridge * unit)
    while int(failed_at):
        # Rounding has made the smallest eigenvalue negative.
        ridge *= 10
        factor, failed_at = torch.linalg.cholesky_ex(gram + ridge * unit)
    # Squared, an entry of the diagonal is what the columns before leave of this one.
    return factor, int((factor.diagonal().square() < max(DEPENDENT, 2 * ridge)).sum())


class PseudoInverse:
    """The affine map as SN-Net's released code finds it, for comparison: by a pseudo-inverse in float32, of all rows at once.

    Its cutoff, the number of rows times the float32 epsilon, drops every direction that a channel some hundred times larger overshadows.
    """

    def __init__(self, in_dim: int, out_dim: int, *, device: torch.device | str = "cpu"):
        self._rows = [(torch.empty(0, in_dim, device=device), torch.empty(0, out_dim, device=device))]

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Add the rows of x `(..., in_dim)` and y `(..., out_dim)`."""
        self._rows.append((x.reshape(-1, x.shape[-1]).float(), y.reshape(-1, y.shape[-1]).float()))

    @torch.no_grad()
    def solve(self) -> AffineMap:
        """The map, with its residual in float64; raises ValueError without any row."""
        x, y = (torch.cat(parts) for parts in zip(*self._rows, strict=True))
        if not len(x):
            raise ValueError("least squares of no rows at all")
        ones = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        inverse = torch.linalg.pinv(ones)
        solution = (inverse @ y).double()
        left = (y.double() - ones.double() @ solution).square().sum()
        variance = (y.double() - y.double().mean(dim=0)).square().sum()
        kept = round(float((inverse @ ones).trace()))
        return AffineMap(solution[:-1].T.contiguous(), solution[-1].clone(), float(left / variance), ones.shape[1] - kept)
