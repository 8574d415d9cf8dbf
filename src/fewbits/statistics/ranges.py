"""Smallest and largest value of each input feature."""

from typing import Self

import torch
from torch import Tensor

from fewbits.core.method import Accumulator
from fewbits.statistics.checks import checked_tokens


class Ranges(Accumulator):
    """`low` and `high`, float32 `[features]`; infinite before a token was seen. A token of weight zero does not count."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.low, self.high = torch.full((features,), torch.inf), torch.full((features,), -torch.inf)

    def update(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """`inputs [tokens, features]`. Raises NumericsError where one is not finite."""
        tokens = checked_tokens(inputs, self.features).float()
        tokens = tokens if weights is None else tokens[weights > 0]
        if len(tokens):
            self.low = torch.minimum(self.low, tokens.amin(0))
            self.high = torch.maximum(self.high, tokens.amax(0))

    def merge(self, other: Self) -> None:
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)

    @property
    def largest_magnitude(self) -> Tensor:
        """`[features]`; zero before a token was seen."""
        return torch.maximum(-self.low, self.high).clamp(min=0)
