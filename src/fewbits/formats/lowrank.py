"""A product of two thin matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term


@dataclass(frozen=True, eq=False)
class LowRank(Term, kind="low_rank"):
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

    def matmul(self, inputs: Tensor) -> Tensor:
        return self.left.matmul(self.right.matmul(inputs))

    def taken(self, rows: Tensor) -> LowRank:
        return LowRank(self.left.taken(rows), self.right)
