"""Two kinds of entries in one matrix: a stored mask says which entries are of the one kind and which of the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Part, Term
from fewbits.formats.coded import spread_groups
from fewbits.formats.packing import pack, packed_width, unpack

MaskStorage = Literal["bitmap", "csr", "smaller"]


@dataclass(frozen=True, eq=False)
class Bitmap(Part, kind="bitmap"):
    """One bit for each entry, `[rows, bytes]`."""

    bits_set: Tensor
    columns: int

    @classmethod
    def from_mask(cls, mask: Tensor) -> Bitmap:
        """`mask [rows, columns]`, bool."""
        return cls(pack(mask.to(torch.uint8), 1), mask.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return self.bits_set.shape[0], self.columns

    def mask(self) -> Tensor:
        """bool `[rows, columns]`."""
        return unpack(self.bits_set, 1, self.columns).bool()


@dataclass(frozen=True, eq=False)
class Positions(Part, kind="positions"):
    """Columns of the chosen entries, row after row, at ceil(log2 columns) bits each, and where each row starts, int32 `[rows + 1]`."""

    column_indices: Tensor  # uint8 [bytes]: one bit stream
    row_pointers: Tensor
    columns: int

    @classmethod
    def from_mask(cls, mask: Tensor) -> Positions:
        """`mask [rows, columns]`, bool."""
        indices, width = mask.nonzero()[:, 1].int(), _index_width(mask.shape[1])
        pointers = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        return cls(pack(indices[None], width)[0], pointers, mask.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return self.row_pointers.numel() - 1, self.columns

    def mask(self) -> Tensor:
        """bool `[rows, columns]`."""
        width, counts = _index_width(self.columns), self.row_pointers.long().diff()
        entries = int(counts.sum())
        indices = unpack(self.column_indices[None], width, entries)[0].long()
        mask = torch.zeros(self.shape, dtype=torch.bool, device=indices.device)
        mask[torch.repeat_interleave(counts), indices] = True
        return mask


def store_mask(mask: Tensor, storage: MaskStorage = "smaller") -> Bitmap | Positions:
    """`mask [rows, columns]` as a bitmap, as positions in compressed sparse rows, or as what takes fewer bits of the two.

    Raises InputError for an unknown storage.
    """
    if storage not in ("bitmap", "csr", "smaller"):
        raise InputError(f"mask_storage={storage!r} is not known; 'bitmap', 'csr' or 'smaller' would be right")
    rows, columns = mask.shape
    bitmap_bytes = rows * packed_width(columns, 1)
    position_bytes = packed_width(int(mask.sum()), _index_width(columns)) + 4 * (rows + 1)
    if storage == "csr" or (storage == "smaller" and position_bytes < bitmap_bytes):
        return Positions.from_mask(mask)
    return Bitmap.from_mask(mask)


@dataclass(frozen=True, eq=False)
class Codes(Term, kind="codes"):
    """Whole numbers 0 to 2**bits - 1, packed `[rows, bytes]`: their own values, for a grid that lies elsewhere. Made by `from_codes`."""

    codes: Tensor
    columns: int
    bits_per_code: int

    @classmethod
    def from_codes(cls, codes: Tensor, *, bits: int) -> Codes:
        """`codes [rows, columns]`. Raises InputError where a code does not fit."""
        return cls(pack(codes, bits), codes.shape[1], bits)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.columns

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return unpack(self.codes, self.bits_per_code, self.columns).to(dtype)


@dataclass(frozen=True, eq=False)
class RowGrid(Part, kind="row_grid"):
    """value = (number - zero_point) * scale + offset; all three `[rows or 1, groups]`, the zero points whole numbers.

    Zero points or offsets that are None count as zero. Raises InputError where shapes disagree.
    """

    scales: Tensor
    zero_points: Tensor | None
    offsets: Tensor | None
    group_size: int  # columns that share a scale; the last group may be shorter

    def __post_init__(self) -> None:
        for name, values in (("zero points", self.zero_points), ("offsets", self.offsets)):
            if values is not None and values.shape != self.scales.shape:
                raise InputError(f"{name} {list(values.shape)} and scales {list(self.scales.shape)} must have one shape")

    def apply(self, numbers: Tensor) -> Tensor:
        """float32 `[rows, columns]` of numbers of that shape."""
        columns = numbers.shape[1]
        if self.zero_points is not None:
            numbers = numbers - spread_groups(self.zero_points.float(), self.group_size, columns)
        values = numbers * spread_groups(self.scales.float(), self.group_size, columns)
        return values if self.offsets is None else values + spread_groups(self.offsets.float(), self.group_size, columns)


@dataclass(frozen=True, eq=False)
class Masked(Term, kind="masked"):
    """Where the mask is set, the next of the `inside` term's values, elsewhere the `outside` term's.

    A term of one row `[1, entries]` holds only the values of its own entries, row after row; a term of the matrix's shape
    has values everywhere, of which those of its own entries count. Either may have a grid, which turns its numbers into
    values. Made by `from_terms`.
    """

    positions: Bitmap | Positions
    inside: Term
    outside: Term
    inside_grid: RowGrid | None = None
    outside_grid: RowGrid | None = None

    @classmethod
    def from_terms(
        cls,
        mask: Tensor,
        inside: Term,
        outside: Term,
        *,
        inside_grid: RowGrid | None = None,
        outside_grid: RowGrid | None = None,
        storage: MaskStorage = "smaller",
    ) -> Masked:
        """`mask [rows, columns]`, bool. Raises InputError where a term or a grid does not fit it."""
        rows, columns = mask.shape
        set_entries = int(mask.sum())
        for name, term, entries in (("inside", inside, set_entries), ("outside", outside, mask.numel() - set_entries)):
            if term.shape not in ((rows, columns), (1, entries)):
                raise InputError(f"the {name} term {list(term.shape)} does not fit; [1, {entries}] or {[rows, columns]} would")
        for grid in (inside_grid, outside_grid):
            if grid is not None and grid.scales.shape not in ((rows, groups := -(-columns // grid.group_size)), (1, groups)):
                raise InputError(f"scales {list(grid.scales.shape)} do not fit a matrix {[rows, columns]} in groups of {grid.group_size}")
        return cls(store_mask(mask, storage), inside, outside, inside_grid, outside_grid)

    @property
    def shape(self) -> tuple[int, int]:
        return self.positions.shape

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        mask = self.positions.mask()
        inside = self._values(self.inside, self.inside_grid, mask)
        return torch.where(mask, inside, self._values(self.outside, self.outside_grid, ~mask)).to(dtype)

    def _values(self, term: Term, grid: RowGrid | None, mask: Tensor) -> Tensor:
        """float32 `[rows, columns]`, right where `mask` is set."""
        numbers = term.decode()
        if tuple(term.shape) != self.shape:
            numbers = torch.zeros(self.shape, device=mask.device).masked_scatter_(mask, numbers)
        return numbers if grid is None else grid.apply(numbers)


def _index_width(columns: int) -> int:
    return max(1, cast(int, (columns - 1).bit_length()))
