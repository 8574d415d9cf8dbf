"""Another term with a few entries replaced by numbers as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term


@dataclass(frozen=True, eq=False)
class Overlaid(Term, kind="overlaid"):
    """`base`, but `values [entries]` at `column_indices [entries]`, row after row.

    Column indices take whole bytes: uint8 up to 256 columns, int16 up to 32768, else int32. `row_counts [rows]` says how many
    entries each row has, in uint8, int16 or int32 by the same rule; None: all have equally many. Made by `from_mask`.
    """

    base: Term
    values: Tensor
    column_indices: Tensor
    row_counts: Tensor | None

    @classmethod
    def from_mask(cls, base: Term, matrix: Tensor, mask: Tensor, *, equal: bool = False, dtype: torch.dtype = torch.float16) -> Overlaid:
        """The entries of `matrix [rows, columns]` where `mask` is true, stored in `dtype`, in the place of `base`'s.

        `equal` says that each row has equally many, which then are not counted. Raises InputError where shapes differ, a value
        is not finite in `dtype`, or rows that should be equal are not.
        """
        if matrix.shape != base.shape or mask.shape != base.shape:
            raise InputError(f"a matrix {list(matrix.shape)} and a mask {list(mask.shape)} do not fit; {list(base.shape)} would for both")
        rows, columns = mask.nonzero(as_tuple=True)
        values, counts = matrix[rows, columns].to(dtype), mask.sum(1)
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"a value is not finite in {dtype}; a wider dtype would be right")
        if equal and len(counts) and not bool((counts == counts[0]).all()):
            raise InputError("rows that are said to have equally many entries do not")
        width = mask.shape[1]
        return cls(base, values, columns.to(_narrow(width - 1)), None if equal else counts.to(_narrow(width)))

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        rows = torch.arange(self.shape[0], device=self.values.device)
        counts = len(self.values) // max(1, len(rows)) if self.row_counts is None else self.row_counts.long()
        places = torch.repeat_interleave(rows, counts), self.column_indices.long()
        return self.base.decode().index_put(places, self.values.float()).to(dtype)

    def stacked(self, below: Term) -> Term | None:
        if not isinstance(below, Overlaid) or below.values.dtype != self.values.dtype or below.shape[1] != self.shape[1]:
            return None
        counts = None
        if self.row_counts is not None and below.row_counts is not None:
            counts = torch.cat([self.row_counts, below.row_counts])
        elif self.row_counts is not below.row_counts or len(self.values) * below.shape[0] != len(below.values) * self.shape[0]:
            return None
        base = self.base.stacked(below.base)
        if base is None:
            return None
        return Overlaid(base, torch.cat([self.values, below.values]), torch.cat([self.column_indices, below.column_indices]), counts)


def _narrow(largest: int) -> torch.dtype:
    """What numbers from 0 to `largest` fit into."""
    return torch.uint8 if largest < 2**8 else torch.int16 if largest < 2**15 else torch.int32
