"""The Hessian of a linear layer's squared output error: H = (2 / tokens) sum of x x^T (GPTQ, arXiv 2210.17323, section 2)."""

from typing import Self

import torch
from torch import Tensor

from fewbits.core.method import Accumulator
from fewbits.kernels import native
from fewbits.statistics.checks import checked_tokens


class Hessian(Accumulator):
    """The weighted mean of x x^T over tokens, times two. Mergeable exactly up to the rounding of its dtype.

    One matrix is all there is in memory: sums are made in its upper blocks and turned into the mean where they lie. The dtype
    is float32, or float64 where that is asked for or the inputs are.
    """

    def __init__(self, features: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(features)
        self.count = 0.0
        self._sums = torch.zeros(features, features, dtype=dtype)  # valid on and above the diagonal
        self._scale: float | None = None  # what the sums were multiplied with, once the matrix was asked for

    def update(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """`inputs [tokens, features]`, each counted `weights [tokens]` times. Raises NumericsError where one is not finite."""
        if inputs.dtype == torch.float64:
            self._sums = self._sums.double()
        sums = self._totals()
        inputs = checked_tokens(inputs, self.features)
        _add_products(inputs, weights, sums)
        self.count += len(inputs) if weights is None else float(weights.sum())

    def merge(self, other: Self) -> None:
        self._totals().add_(other._totals())
        self.count += other.count

    @property
    def matrix(self) -> Tensor:
        """`[features, features]`, positive semi-definite; zero before any token was seen. Belongs to this object: copy before changing."""
        scale = 2.0 / max(self.count, 1.0)
        if self._scale != scale:
            self._totals().mul_(scale)
            self._scale = scale
            for row in range(1, self.features):
                self._sums[row, :row] = self._sums[:row, row]
        return self._sums

    def damped(self, share: float) -> Tensor:
        """A copy of the matrix with `share` of its mean diagonal added, so that inputs that are always zero do not leave choices open."""
        matrix = self.matrix.clone()
        matrix.diagonal().add_(max(float(share * matrix.diagonal().mean()), 1e-12))
        return matrix

    def _totals(self) -> Tensor:
        if self._scale is not None:
            self._sums.div_(self._scale)
            self._scale = None
        return self._sums


def _add_products(inputs: Tensor, weights: Tensor | None, sums: Tensor) -> None:
    """sums += inputs^T diag(weights) inputs on and above the diagonal: by a kernel of the inputs' dtype or of float32 where there are no
    weights, else in blocks, in the dtype of `sums`.
    """
    if weights is None and native.add_products(inputs, sums):
        return
    if inputs.dtype != sums.dtype:
        return _add_products(inputs.to(sums.dtype), weights, sums)
    weighted = inputs if weights is None else inputs * weights.to(inputs.dtype)[:, None]
    step = max(128, -(-len(sums) // 8))
    for start in range(0, len(sums), step):
        end = start + step
        sums[start:end, start:].addmm_(weighted[:, start:end].T, inputs[:, start:])
