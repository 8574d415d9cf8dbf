"""Another term with a scale for every column."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term


@dataclass(frozen=True, eq=False)
class ColumnScaled(Term, kind="column_scaled"):
    """`inner` times diag(scale), scale `[columns]`: for a part of a matrix, where a transform would scale all inputs.

    Raises InputError where the scale does not fit.
    """

    inner: Term
    scale: Tensor

    def __post_init__(self) -> None:
        if self.scale.shape != (self.inner.shape[1],):
            raise InputError(f"a scale {list(self.scale.shape)} does not fit {self.inner.shape[1]} columns")

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.inner.decode() * self.scale.float()).to(dtype)

    def matmul(self, inputs: Tensor) -> Tensor:
        return self.inner.matmul(inputs * self.scale.to(inputs.dtype))
