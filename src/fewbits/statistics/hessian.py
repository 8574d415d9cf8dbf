"""The Hessian of a linear layer's squared output error: H = (2 / tokens) sum of x x^T (GPTQ, arXiv 2210.17323, section 2)."""

from typing import Self

import torch
from torch import Tensor

from fewbits.core.method import Accumulator
from fewbits.statistics.checks import checked_tokens


class Hessian(Accumulator):
    """Sums x x^T over tokens in `total`, which is valid on and above its diagonal; `matrix` is the weighted mean times two.

    Mergeable exactly up to the rounding of `dtype`.
    """

    def __init__(self, features: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(features)
        self.total = torch.zeros(features, features, dtype=dtype)
        self.count = 0.0

    def update(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """`inputs [tokens, features]`, each counted `weights [tokens]` times. Raises NumericsError where one is not finite."""
        inputs = checked_tokens(inputs, self.features).to(self.total.dtype)
        weighted = inputs if weights is None else inputs * weights.to(inputs.dtype)[:, None]
        # The matrix is symmetric: only blocks on and above its diagonal are computed.
        step = max(128, -(-self.features // 8))
        for start in range(0, self.features, step):
            end = start + step
            self.total[start:end, start:].addmm_(weighted[:, start:end].T, inputs[:, start:])
        self.count += len(inputs) if weights is None else float(weights.sum())

    def merge(self, other: Self) -> None:
        self.total += other.total
        self.count += other.count

    @property
    def matrix(self) -> Tensor:
        """`[features, features]`, positive semi-definite; zero before any token was seen."""
        matrix = self.total * (2.0 / max(self.count, 1.0))
        for row in range(1, self.features):
            matrix[row, :row] = matrix[:row, row]
        return matrix
