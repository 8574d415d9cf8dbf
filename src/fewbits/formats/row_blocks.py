"""Different terms for different runs of neighbouring rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term


@dataclass(frozen=True, eq=False)
class RowBlocks(Term, kind="row_blocks"):
    """The matrices of `parts`, of equally many columns, one under the other. Raises InputError where there are none or columns differ."""

    parts: tuple[Term, ...]

    def __post_init__(self) -> None:
        if len({part.shape[1] for part in self.parts}) != 1:
            raise InputError(f"parts {[tuple(part.shape) for part in self.parts]} cannot stand one under the other; equal columns could")

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.cat([part.decode(dtype) for part in self.parts])

    def matmul(self, inputs: Tensor) -> Tensor:
        return torch.cat([part.matmul(inputs) for part in self.parts], dim=-1)

    def stacked(self, below: Term) -> Term | None:
        if below.shape[1] != self.shape[1]:
            return None
        others = below.parts if isinstance(below, RowBlocks) else (below,)
        joined = self.parts[-1].stacked(others[0])
        return RowBlocks((*self.parts[:-1], joined, *others[1:]) if joined is not None else (*self.parts, *others))
