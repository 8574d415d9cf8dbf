"""A product of two thin matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term
from fewbits.formats.coded import Described, multiply_terms
from fewbits.formats.dense import Dense
from fewbits.kernels.layout import Description, plain
from fewbits.kernels.sums import Factors


@dataclass(frozen=True, eq=False)
class LowRank(Described, kind="low_rank"):
    """left `[rows, rank]` times right `[rank, columns]`; each factor is a term. Raises InputError where the ranks differ."""

    left: Term
    right: Term

    def __post_init__(self) -> None:
        if self.left.shape[1] != self.right.shape[0]:
            raise InputError(f"factors {list(self.left.shape)} and {list(self.right.shape)} cannot be multiplied")

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.left.decode() @ self.right.decode()).to(dtype)

    def factors(self) -> Factors | None:
        left, right = (_described(factor) for factor in (self.left, self.right))
        return None if left is None or right is None else (left, right)

    def matmul(self, inputs: Tensor) -> Tensor:
        found = multiply_terms((self,), inputs)
        return self.left.matmul(self.right.matmul(inputs)) if found is None else found

    def taken(self, rows: Tensor) -> LowRank:
        return LowRank(self.left.taken(rows), self.right)


def _described(factor: Term) -> Description | None:
    """A factor that is one matrix, as kernels read it."""
    if isinstance(factor, Dense):
        return plain(factor.values)
    found = factor.factors() if isinstance(factor, Described) else None
    return found[0] if found is not None and len(found) == 1 else None
