"""What a layout says, as the kernels of this folder take it: which tensor is what, and how a code becomes a number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from fewbits.kernels import layout as kinds

# What a code stands for.
MIDDLE, ZEROS, PACKED_ZEROS, FROM_ZERO, FROM_MINIMUMS, SIGNS, SIGNS_AND_OFFSETS, ONE_BOOK, BOOK_A_GROUP, NUMBERS = range(10)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of `native.number`


@dataclass(frozen=True)
class Table:
    """Scales, zero points, offsets or levels `[rows or 1, columns]`: the tensor at `place`, or a matrix of codes with its own tensors."""

    kind: int
    rows: int
    columns: int
    place: int
    dtype: torch.dtype
    inner: Structure | None = None


@dataclass(frozen=True)
class Structure:
    """A matrix of codes, whose tensors begin at `place`; or, where `grid` is NUMBERS, of numbers as they are."""

    rows: int
    columns: int
    bits: int
    group: int  # columns that share a scale
    groups: int
    grid: int
    place: int
    dtype: torch.dtype
    levels: Table | None = None
    scales: Table | None = None
    zeros: Table | None = None

    @property
    def row_width(self) -> int:
        """Elements from a row to the next: bytes of codes, or numbers."""
        if self.grid == NUMBERS:
            return self.columns
        return (self.columns + 4) // 5 if self.bits == kinds.BASE_THREE else (self.columns * self.bits + 7) // 8


@dataclass(frozen=True)
class SparseRows:
    """Compressed sparse rows: values, column indices and row pointers."""

    rows: int
    columns: int
    entries: int
    dtype: torch.dtype
    index_dtype: torch.dtype


@lru_cache(maxsize=4096)  # a model has a few layouts, which every step asks for
def read(layout: tuple[int, ...]) -> Structure | SparseRows | None:
    """What `layout` (see `kernels/layout.py`) describes; None for what no kernel of this folder computes with.

    Raises ValueError where it says what cannot be.
    """
    reader = _Reader(layout)
    found = reader.numbers_or_entries() if layout[2:3] == (0,) else reader.coded()
    return found if reader.served else None


class _Reader:
    """Walks along a layout, and counts the tensors that it has passed."""

    def __init__(self, layout: tuple[int, ...]) -> None:
        self.layout, self.at, self.place, self.served = layout, 0, 0, True

    def take(self, count: int = 1) -> list[int]:
        self.at += count
        if self.at > len(self.layout):
            raise ValueError("a layout ends too early")
        return list(self.layout[self.at - count : self.at])

    def take_one(self) -> int:
        return self.take()[0]

    def numbers_or_entries(self) -> Structure | SparseRows | None:
        rows, columns, _, form = self.take(4)
        if form == kinds.PLAIN:
            return Structure(rows, columns, 0, columns, 1, NUMBERS, 0, _dtype(self.take_one()))
        if form != kinds.SPARSE:
            return None
        kind, width, entries = self.take(3)
        if width not in (2, 4):
            raise ValueError(f"column indices of {width} bytes are not known")
        return SparseRows(rows, columns, entries, _dtype(kind), torch.int16 if width == 2 else torch.int32)

    def coded(self) -> Structure:
        rows, columns, bits, group = self.take(4)
        if min(rows, columns, group) < 1 or not 1 <= bits <= kinds.BASE_THREE:
            raise ValueError(f"a matrix [{rows}, {columns}] of {bits} bits in groups of {group} cannot be")
        place, groups = self.place, -(-columns // group)
        self.place += 1
        levels, scales = self.table(self.take_one(), (rows, 0)), self.table(self.take_one(), (rows, groups))
        if any(table is not None and table.kind == kinds.PACKED for table in (levels, scales)):
            raise ValueError("levels and scales are not packed")
        counts = kind = self.take_one()
        if counts in (kinds.SIGNS, kinds.MINIMUMS):  # offsets, or nothing, follow
            kind = self.take_one()
        zeros = self.table(kind, (rows, groups))
        grid = self.grid(levels, counts, zeros, (bits, groups))
        return Structure(rows, columns, bits, group, groups, grid, place, torch.uint8, levels, scales, zeros)

    def table(self, kind: int, expected: tuple[int, int]) -> Table | None:
        """Scales, zero points, offsets or levels of the `expected` rows and columns; any columns where 0."""
        if kind == kinds.NONE:
            return None
        if kind == kinds.RUNS:
            self.served = False
            self.take(self.take_one() + 2)  # where they end, the columns and the dtype
            self.place += 1
            return None
        place = self.place
        if kind == kinds.CODED:
            inner = self.coded()
            table = Table(kind, inner.rows, inner.columns, place, torch.float32, inner)
        elif kind in (kinds.DENSE, kinds.PACKED, kinds.TABLE):
            rows, columns, number = self.take(3)
            self.place += 2 if kind == kinds.TABLE else 1
            table = Table(kind, rows, columns, place, _dtype(number) if kind == kinds.DENSE else torch.uint8)
        else:
            raise ValueError(f"a table of kind {kind} is not known")
        if table.rows not in (1, expected[0]) or expected[1] not in (0, table.columns):
            raise ValueError(f"a table [{table.rows}, {table.columns}] does not fit {expected[0]} rows of {expected[1]} groups")
        return table

    def grid(self, levels: Table | None, counts: int, zeros: Table | None, sizes: tuple[int, int]) -> int:
        """What a code stands for, by what codes count from; raises ValueError for what does not fit so many bits and groups."""
        bits, groups = sizes
        if bits == kinds.BASE_THREE and (levels is not None or counts != kinds.NONE):
            raise ValueError("codes to the base of three have neither levels nor zero points")
        if levels is not None:
            if levels.columns not in (2**bits, groups * 2**bits):
                raise ValueError(f"{levels.columns} levels do not fit {groups} groups and codes of {bits} bits")
            return ONE_BOOK if levels.columns == 2**bits else BOOK_A_GROUP
        if counts in (kinds.SIGNS, kinds.MINIMUMS) and zeros is not None and zeros.kind == kinds.PACKED:
            raise ValueError("offsets are not packed")
        if counts == kinds.MINIMUMS:
            return FROM_ZERO if zeros is None else FROM_MINIMUMS
        if counts == kinds.SIGNS:
            if bits != 1:
                raise ValueError(f"signs have one bit, not {bits}")
            return SIGNS if zeros is None else SIGNS_AND_OFFSETS
        if zeros is None:
            return MIDDLE
        return PACKED_ZEROS if zeros.kind == kinds.PACKED else ZEROS


def _dtype(number: int) -> torch.dtype:
    if not 0 <= number < len(_DTYPES):
        raise ValueError(f"numbers of kind {number} are not known")
    return _DTYPES[number]
