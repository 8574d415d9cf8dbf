"""A sum of terms where one term is asked for, and what is the same in all rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term


@dataclass(frozen=True, eq=False)
class Total(Term, kind="total"):
    """The sum of `parts`, of one shape. Raises InputError where there are none or shapes differ."""

    parts: tuple[Term, ...]

    def __post_init__(self) -> None:
        if len({tuple(part.shape) for part in self.parts}) != 1:
            raise InputError(f"parts {[tuple(part.shape) for part in self.parts]} cannot be added; equal shapes would be right")

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.stack([part.decode() for part in self.parts]).sum(0).to(dtype)

    def matmul(self, inputs: Tensor) -> Tensor:
        return torch.stack([part.matmul(inputs) for part in self.parts]).sum(0)


@dataclass(frozen=True, eq=False)
class ColumnOffsets(Term, kind="column_offsets"):
    """A matrix of `rows` equal rows, `offsets [columns]`."""

    offsets: Tensor
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.offsets.numel()

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.offsets.to(dtype).expand(self.rows, -1)

    def matmul(self, inputs: Tensor) -> Tensor:
        return (inputs @ self.offsets.to(inputs.dtype))[..., None].expand(*inputs.shape[:-1], self.rows)
