"""A term that reads a layer's inputs as they are, where the other terms read rounded ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.core.tensor import Term
from fewbits.formats.coded import Described
from fewbits.kernels.sums import Factors


@dataclass(frozen=True, eq=False)
class Unrounded(Described, kind="unrounded"):
    """`inner`, with the inputs before the activation quantizer."""

    inner: Term
    reads_unrounded: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.inner.decode(dtype)

    def factors(self) -> Factors | None:
        return self.inner.factors() if isinstance(self.inner, Described) else None

    def matmul(self, inputs: Tensor) -> Tensor:
        return self.inner.matmul(inputs)
