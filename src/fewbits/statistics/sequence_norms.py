"""How large each input feature is over a whole sequence (BitStack, arXiv 2410.23918, section 3.2)."""

from typing import ClassVar, Self

import torch
from torch import Tensor

from fewbits.core.method import Accumulator
from fewbits.statistics.checks import checked_tokens


class SequenceNorms(Accumulator):
    """`mean`, float32 `[features]`: over the sequences, the mean of a feature's Euclidean norm over the tokens of each."""

    by_sequence: ClassVar[bool] = True

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.sums, self.count = torch.zeros(features, dtype=torch.float64), 0

    def update(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """`inputs [sequences, tokens, features]`, or `[tokens, features]` of one sequence; `weights` of the leading sizes.

        Raises NumericsError where an input is not finite.
        """
        checked_tokens(inputs.flatten(0, -2), self.features)
        squares = inputs.double().square()
        if weights is not None:
            squares = squares * weights.double()[..., None]
        norms = squares.sum(-2).sqrt().reshape(-1, self.features)
        self.sums += norms.sum(0)
        self.count += len(norms)

    def merge(self, other: Self) -> None:
        self.sums += other.sums
        self.count += other.count

    @property
    def mean(self) -> Tensor:
        return (self.sums / max(self.count, 1)).float()
