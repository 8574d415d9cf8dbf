"""Different terms for different runs of columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term


@dataclass(frozen=True, eq=False)
class Columns(Term, kind="columns"):
    """The matrices of `parts`, of equally many rows, side by side. Raises InputError where there are none or rows differ."""

    parts: tuple[Term, ...]

    def __post_init__(self) -> None:
        if len({part.shape[0] for part in self.parts}) != 1:
            raise InputError(f"parts {[tuple(part.shape) for part in self.parts]} cannot stand side by side; equal rows would be right")

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape[0], sum(part.shape[1] for part in self.parts)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.cat([part.decode(dtype) for part in self.parts], dim=1)

    def matmul(self, inputs: Tensor) -> Tensor:
        parts = inputs.split([part.shape[1] for part in self.parts], dim=-1)
        outputs = [term.matmul(part) for term, part in zip(self.parts, parts, strict=True)]
        return torch.stack(outputs).sum(0)
