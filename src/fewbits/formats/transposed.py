"""Another term's transpose: for tensors whose groups run along rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.tensor import Term


@dataclass(frozen=True, eq=False)
class Transposed(Term, kind="transposed"):
    """Stands for the transpose of `inner`."""

    inner: Term

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.inner.shape
        return columns, rows

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.inner.decode(dtype).T

    def matmul(self, inputs: Tensor) -> Tensor:
        return self.inner.matmul_transposed(inputs)

    def matmul_transposed(self, inputs: Tensor) -> Tensor:
        return self.inner.matmul(inputs)

    def stacked(self, below: Term) -> Term | None:
        joined = self.inner.widened(below.inner) if isinstance(below, Transposed) else None
        return None if joined is None else Transposed(joined)

    def widened(self, beside: Term) -> Term | None:
        joined = self.inner.stacked(beside.inner) if isinstance(beside, Transposed) else None
        return None if joined is None else Transposed(joined)
