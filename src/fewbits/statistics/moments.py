"""First and second moments of each input feature, and of its magnitude."""

from typing import Self

import torch
from torch import Tensor

from fewbits.core.method import Accumulator
from fewbits.statistics.checks import checked_tokens


class Moments(Accumulator):
    """Weighted sums over tokens in float64; `mean`, `mean_square` and `mean_magnitude` are `[features]`."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.sums = torch.zeros(3, features, dtype=torch.float64)  # of x, x**2, |x|
        self.count = 0.0

    def update(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """`inputs [tokens, features]`, each counted `weights [tokens]` times. Raises NumericsError where one is not finite."""
        wide = checked_tokens(inputs, self.features).double()
        weighting = torch.ones(len(wide), dtype=torch.float64) if weights is None else weights.double()
        self.sums += torch.stack([weighting @ wide, weighting @ wide.square(), weighting @ wide.abs()])
        self.count += float(weighting.sum())

    def merge(self, other: Self) -> None:
        self.sums += other.sums
        self.count += other.count

    @property
    def mean(self) -> Tensor:
        return (self.sums[0] / max(self.count, 1.0)).float()

    @property
    def mean_square(self) -> Tensor:
        return (self.sums[1] / max(self.count, 1.0)).float()

    @property
    def mean_magnitude(self) -> Tensor:
        return (self.sums[2] / max(self.count, 1.0)).float()
