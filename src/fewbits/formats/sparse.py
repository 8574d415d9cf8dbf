"""Few entries that matter: compressed sparse rows, and fixed patterns that keep n of every m."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term
from fewbits.formats.coded import Described
from fewbits.formats.packing import pack, unpack
from fewbits.kernels import layout
from fewbits.kernels.sums import Factors


@dataclass(frozen=True, eq=False)
class Sparse(Described, kind="sparse"):
    """Compressed sparse rows: `values [entries]`, their `column_indices`, and where each row starts, `row_pointers [rows + 1]`.

    Column indices are int16 up to 32768 columns, else int32; row pointers are int32. Made by `from_dense`.
    """

    values: Tensor
    column_indices: Tensor
    row_pointers: Tensor
    columns: int

    @classmethod
    def from_dense(cls, matrix: Tensor, mask: Tensor, dtype: torch.dtype = torch.float16) -> Sparse:
        """The entries of `matrix [rows, columns]` where `mask` is true, stored in `dtype`.

        Raises InputError where the shapes differ or a value is not finite in `dtype`.
        """
        if matrix.ndim != 2 or mask.shape != matrix.shape:
            raise InputError(f"a matrix {list(matrix.shape)} and a mask {list(mask.shape)} must both be [rows, columns]")
        rows, columns = mask.nonzero(as_tuple=True)
        values = matrix[rows, columns].to(dtype)
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"a value is not finite in {dtype}; a wider dtype, or finite weights, would be right")
        counts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
        narrow = torch.int16 if matrix.shape[1] <= 2**15 else torch.int32
        return cls(values, columns.to(narrow), counts.to(torch.int32), matrix.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return self.row_pointers.numel() - 1, self.columns

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        matrix = torch.zeros(self.shape, dtype=torch.float32, device=self.values.device)
        rows = torch.repeat_interleave(self.row_pointers.long().diff())
        matrix[rows, self.column_indices.long()] = self.values.float()
        return matrix.to(dtype)

    def factors(self) -> Factors | None:
        found = layout.sparse(self.values, self.column_indices, self.row_pointers, self.columns)
        return None if found is None else (found,)

    def taken(self, rows: Tensor) -> Sparse:
        starts, counts = self.row_pointers[rows].long(), self.row_pointers.diff()[rows].long()
        ends = counts.cumsum(0)
        # An entry's place: its row's first one, and how many entries of the same row come before it.
        places = torch.arange(int(counts.sum()), device=rows.device) + torch.repeat_interleave(starts - ends + counts, counts)
        pointers = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
        return Sparse(self.values[places], self.column_indices[places], pointers, self.columns)


@dataclass(frozen=True, eq=False)
class Pattern(Term, kind="pattern"):
    """Of every `span` units of `unit` neighbouring columns, each row keeps `kept`; what is kept is itself a term.

    2:4 sparsity is kept=2, span=4, unit=1; group sparsity keeps whole groups, unit=group_size. `values` is a term of shape
    `[rows, spans * kept * unit]`; `positions` are packed numbers 0..span-1, ascending in each span. Where the columns end
    inside the last unit, its values beyond them are stored and mean nothing. Made by `from_mask`.
    """

    values: Term
    positions: Tensor
    columns: int
    kept: int
    span: int
    unit: int

    @classmethod
    def from_mask(cls, mask: Tensor, values: Term, *, kept: int, span: int, unit: int = 1, columns: int | None = None) -> Pattern:
        """`mask [rows, units]`: exactly `kept` of every `span` are true; `values` holds the kept columns in order.

        `columns` is units * unit, or less by a part of the last unit.

        Raises InputError where the mask breaks the pattern or the shapes disagree.
        """
        rows, units = mask.shape
        if not 1 <= kept <= span <= 2**16 or units % span:
            raise InputError(f"{units} units cannot keep {kept} of every {span}; a multiple of the span, and at most 65536, would be right")
        if not bool((mask.reshape(rows, -1, span).sum(-1) == kept).all()):
            raise InputError(f"the mask does not keep exactly {kept} of every {span}")
        if values.shape != (rows, units // span * kept * unit):
            raise InputError(f"values {list(values.shape)} do not fit; [{rows}, {units // span * kept * unit}] would")
        columns = units * unit if columns is None else columns
        if not (units - 1) * unit < columns <= units * unit:
            raise InputError(f"{columns} columns do not fit {units} units of {unit}")
        positions = mask.nonzero()[:, 1].reshape(rows, -1) % span
        return cls(values, pack(positions, _width(span)), columns, kept, span, unit)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.columns

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        values = self.values.decode(dtype)
        padded = -(-self.columns // self.unit) * self.unit
        matrix = torch.zeros(self.shape[0], padded, dtype=dtype, device=values.device)
        return matrix.scatter_(1, self.kept_columns(), values)[:, : self.columns]

    def kept_columns(self) -> Tensor:
        """int64 `[rows, spans * kept * unit]`: the column of every kept value."""
        count = self.values.shape[1] // self.unit
        device = self.positions.device
        spans = torch.arange(count, device=device) // self.kept * self.span
        units = unpack(self.positions, _width(self.span), count).long() + spans
        return (units[:, :, None] * self.unit + torch.arange(self.unit, device=device)).flatten(1)


def _width(span: int) -> int:
    return max(1, math.ceil(math.log2(span)))
