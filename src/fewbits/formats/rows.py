"""Different terms for different output rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term


@dataclass(frozen=True, eq=False)
class Rows(Term, kind="rows"):
    """Row i of the stacked `terms` is row `order[i]` of the matrix; `order [rows]` is int16 or int32.

    Raises InputError where the terms differ in columns or `order` does not name every row once.
    """

    terms: tuple[Term, ...]
    order: Tensor

    def __post_init__(self) -> None:
        if len({term.shape[1] for term in self.terms}) != 1:
            raise InputError(f"terms of different widths cannot be stacked: {[tuple(term.shape) for term in self.terms]}")
        rows = sum(term.shape[0] for term in self.terms)
        expected = torch.arange(rows, dtype=self.order.dtype, device=self.order.device)
        if self.order.shape != (rows,) or (not self.order.is_meta and not torch.equal(self.order.sort().values, expected)):
            raise InputError(f"the order of {rows} rows must hold each of 0 to {rows - 1} once")

    @property
    def shape(self) -> tuple[int, int]:
        return self.order.numel(), self.terms[0].shape[1]

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        stacked = torch.cat([term.decode(dtype) for term in self.terms])
        return torch.empty_like(stacked).index_copy_(0, self.order.long(), stacked)

    def matmul(self, inputs: Tensor) -> Tensor:
        stacked = torch.cat([term.matmul(inputs) for term in self.terms], dim=-1)
        return torch.empty_like(stacked).index_copy_(-1, self.order.long(), stacked)
