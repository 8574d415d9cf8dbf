"""Numbers as they are: the term that every other is compared with, and what factors and kept values are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term
from fewbits.kernels import dispatch, layout


@dataclass(frozen=True, eq=False)
class Dense(Term, kind="dense"):
    """`values [rows, columns]` in any floating dtype. Raises InputError for another number of axes."""

    values: Tensor

    def __post_init__(self) -> None:
        if self.values.ndim != 2:
            raise InputError(f"values {list(self.values.shape)} are no matrix; [rows, columns] would be right")

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.values.to(dtype)

    def matmul(self, inputs: Tensor) -> Tensor:
        # Torch would write numbers of 16 bits out in the inputs' dtype first, each time.
        narrow = self.values.dtype != inputs.dtype and self.values.element_size() == 2
        found = dispatch.multiply(layout.plain(self.values), inputs) if narrow else None
        return super().matmul(inputs) if found is None else found

    def taken(self, rows: Tensor) -> Dense:
        return Dense(self.values.index_select(0, rows))

    def stacked(self, below: Term) -> Term | None:
        return self._joined(below, 0)

    def widened(self, beside: Term) -> Term | None:
        return self._joined(beside, 1)

    def _joined(self, other: Term, axis: int) -> Term | None:
        if not isinstance(other, Dense) or other.values.dtype != self.values.dtype or other.shape[1 - axis] != self.shape[1 - axis]:
            return None
        return Dense(torch.cat([self.values, other.values], axis))
