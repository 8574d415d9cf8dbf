"""Free levels: each code looks its value up in a codebook, for a tensor, a row or a group, fixed or learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term
from fewbits.formats.coded import Coded, describe_numbers, taken_rows
from fewbits.formats.packing import pack, unpack
from fewbits.kernels.layout import ABSENT, Description, coded, in_runs


@dataclass(frozen=True, eq=False)
class Codebook(Coded, kind="codebook"):
    """value = levels[row, group, code] * scales[row, group].

    Packed codes `[rows, bytes]`, levels `[rows or 1, groups or 1, 2**bits]` ascending in no particular order, scales
    `[rows or 1, groups]`, themselves numbers or a term of that shape, or None for levels that are the values themselves.
    With `row_ends`, where each run of neighbouring rows ends, levels or scales may have one row for each run. Made by `from_codes`.
    """

    codes: Tensor
    levels: Tensor
    scales: Tensor | Term | None
    rows: int
    columns: int
    bits_per_code: int
    group_size: int
    row_ends: tuple[int, ...] = ()

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        levels: Tensor,
        scales: Tensor | Term | None = None,
        *,
        bits: int,
        group_size: int | None = None,
        row_ends: tuple[int, ...] = (),
    ) -> Codebook:
        """`codes [rows, columns]` in 0..2**bits-1. Raises InputError where shapes disagree or a level or scale is not finite."""
        rows, columns = codes.shape
        size = columns if group_size is None else group_size
        if size < 1:
            raise InputError(f"group_size={size} is out of range; it must be at least 1, or None for whole rows")
        groups, runs = -(-columns // size), len(row_ends) or rows
        if row_ends and (list(row_ends) != sorted(row_ends) or row_ends[0] < 0 or row_ends[-1] != rows):
            raise InputError(f"runs of rows that end at {row_ends} do not cut {rows} rows; ascending numbers up to {rows} would")
        if levels.ndim != 3 or levels.shape[0] not in (1, rows, runs) or levels.shape[1] not in (1, groups) or levels.shape[2] != 2**bits:
            raise InputError(f"levels {list(levels.shape)} do not fit; [1 or {runs}, 1 or {groups}, {2**bits}] would")
        if scales is not None and (scales.shape[0] not in (1, rows, runs) or scales.shape[1:] != (groups,)):
            raise InputError(
                f"scales {list(scales.shape)} do not fit codes {[rows, columns]} in groups of {size}; [{rows}, {groups}] would"
            )
        for name, stored in (("level", levels), ("scale", scales)):
            values = stored.decode() if isinstance(stored, Term) else stored
            if values is not None and not bool(torch.isfinite(values).all()):
                raise InputError(f"a {name} is not finite in {values.dtype}; a wider dtype, or finite weights, would be right")
        return cls(pack(codes, bits), levels, scales, rows, columns, bits, size, row_ends)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def described(self) -> Description | None:
        levels, scales = self._describe(self.levels.flatten(1)), self._describe(self.scales)
        if self.bits_per_code > 8 or levels is None or scales is None:
            return None
        return coded((self.rows, self.columns, self.bits_per_code, self.group_size), self.codes, levels, scales, ABSENT)

    def define(self, dtype: torch.dtype = torch.float32) -> Tensor:
        groups = torch.arange(self.columns, device=self.codes.device) // self.group_size
        codes = unpack(self.codes, self.bits_per_code, self.columns).long()
        books = self.levels.float()
        values = books[self._places(len(books))[:, None], groups if books.shape[1] > 1 else 0, codes]
        if self.scales is not None:
            scales = self.scales.decode() if isinstance(self.scales, Term) else self.scales.float()
            values = values * scales[self._places(len(scales))][:, groups]
        return values.to(dtype)

    def stacked(self, below: Term) -> Term | None:
        """Where both look up in the same levels, which no row has for itself, and scales are each row's own numbers, or none."""
        if not isinstance(below, Codebook) or self.row_ends or below.row_ends or len(self.levels) != 1:
            return None
        sizes = [(one.columns, one.bits_per_code, one.group_size, one.levels.dtype) for one in (self, below)]
        if sizes[0] != sizes[1] or not (self.levels is below.levels or torch.equal(self.levels, below.levels)):
            return None
        scales: Tensor | None = None
        if self.scales is not None or below.scales is not None:
            pair = (self.scales, below.scales)
            if not (isinstance(pair[0], Tensor) and isinstance(pair[1], Tensor) and pair[0].dtype == pair[1].dtype):
                return None
            if len(pair[0]) != self.rows or len(pair[1]) != below.rows:
                return None
            scales = torch.cat([pair[0], pair[1]])
        codes = torch.cat([self.codes, below.codes])
        return Codebook(codes, self.levels, scales, self.rows + below.rows, self.columns, self.bits_per_code, self.group_size)

    def taken(self, rows: Tensor) -> Codebook:
        levels = cast(Tensor, taken_rows(self.levels, self._places(len(self.levels))[rows]))
        scales = None if self.scales is None else taken_rows(self.scales, self._places(self.scales.shape[0])[rows])
        return Codebook(self.codes.index_select(0, rows), levels, scales, len(rows), self.columns, self.bits_per_code, self.group_size)

    def _describe(self, stored: Tensor | Term | None) -> Description | None:
        """Levels or scales: of all rows, of each or of each run."""
        found = describe_numbers(stored)
        if found is None or stored is None or stored.shape[0] == 1 or stored.shape[0] != len(self.row_ends):
            return found
        return in_runs(found, self.row_ends)

    def _places(self, count: int) -> Tensor:
        """int64 `[rows]`: which of `count` rows of levels or scales each row has."""
        rows = torch.arange(self.rows, device=self.codes.device)
        if count == 1:
            return torch.zeros_like(rows)
        if count == len(self.row_ends):
            return torch.bucketize(rows, torch.tensor(self.row_ends, device=rows.device), right=True)
        return rows


def normal_float_levels(bits: int = 4, offset: float | None = None) -> Tensor:
    """float32 `[2**bits]`, ascending from -1 to 1 with an exact zero: quantiles of the normal distribution.

    NormalFloat of QLoRA (arXiv 2305.14314, section 3): one level more above zero than below. `offset` is the outermost
    probability; by default the mean of the two ends' half-steps, which for 4 bits is the published 0.9677083.
    """
    half = 2 ** (bits - 1)
    offset = 1 - 0.5 * (1 / (4 * half) + 1 / (4 * half - 2)) if offset is None else offset
    above = torch.special.ndtri(torch.linspace(offset, 0.5, half + 1, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, half, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (levels / levels.abs().max()).float()


def nearest_codes(values: Tensor, levels: Tensor) -> Tensor:
    """uint8 codes of the nearest of `levels [2**bits]` for every entry of `values`; ties go to the lower level."""
    ordered, order = levels.to(values.dtype).sort()
    midpoints = (ordered[1:] + ordered[:-1]) / 2
    return order.to(torch.uint8)[torch.bucketize(values, midpoints)]
