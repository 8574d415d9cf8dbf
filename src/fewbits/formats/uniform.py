"""Evenly spaced levels: value = (code - zero_point) * scale, for each tensor, row or group of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term
from fewbits.formats.coded import Coded, describe_numbers, spread_groups, stored_numbers, taken_rows
from fewbits.formats.packing import pack, unpack
from fewbits.formats.ranges import fit_extremes, round_codes
from fewbits.kernels.layout import ABSENT, Description, coded, packed


@dataclass(frozen=True, eq=False)
class Uniform(Coded, kind="uniform"):
    """Packed codes `[rows, bytes]`, scales `[rows or 1, groups]`, and zero points of one of three kinds.

    `zero_points` None is the symmetric grid, whose zero point is 2**(bits-1); uint8 are integer zero points packed at the
    width of the codes; floating point are real zero points. Scales and zero points may themselves be a term of that shape:
    the second level of a two-level grid. Made by `from_codes`.
    """

    codes: Tensor
    scales: Tensor | Term
    zero_points: Tensor | Term | None
    rows: int
    columns: int
    bits_per_code: int
    group_size: int  # columns that share a scale; the last group may be shorter

    @classmethod
    def from_codes(
        cls, codes: Tensor, scales: Tensor | Term, zero_points: Tensor | Term | None, *, bits: int, group_size: int | None = None
    ) -> Uniform:
        """`codes [rows, columns]` in 0..2**bits-1; `scales` and `zero_points` `[rows or 1, groups]`; no group size: whole rows.

        Raises InputError where shapes disagree, a scale is not finite, or a code does not fit.
        """
        rows, columns = codes.shape
        size = columns if group_size is None else group_size
        if size < 1:
            raise InputError(f"group_size={size} is out of range; it must be at least 1, or None for whole rows")
        groups = -(-columns // size)
        if scales.shape[0] not in (1, rows) or scales.shape[1:] != (groups,):
            raise InputError(
                f"scales {list(scales.shape)} do not fit codes {[rows, columns]} in groups of {size}; [{rows}, {groups}] would"
            )
        if zero_points is not None and zero_points.shape != scales.shape:
            raise InputError(f"zero points {list(zero_points.shape)} and scales {list(scales.shape)} must have one shape")
        if not bool(torch.isfinite(stored_numbers(scales)).all()):
            stored = scales.dtype if isinstance(scales, Tensor) else f"a term of kind {scales.kind}"
            raise InputError(f"a scale is not finite in {stored}; a wider dtype, or finite weights, would be right")
        if isinstance(zero_points, Tensor) and not zero_points.is_floating_point():
            zero_points = pack(zero_points, bits)
        return cls(pack(codes, bits), scales, zero_points, rows, columns, bits, size)

    @classmethod
    def nearest(cls, weight: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, group_size: int, symmetric: bool) -> Uniform:
        """`weight [rows, columns]` rounded on given grids: scales, stored in fp16, and whole zero points, both `[rows, groups]`."""
        scales = scales.half()  # what will be stored is what is rounded with
        wide_scales, wide_zeros = (v.repeat_interleave(group_size, dim=1)[:, : weight.shape[1]] for v in (scales.float(), zeros))
        codes = round_codes(weight, wide_scales, wide_zeros, bits).to(torch.uint8)
        return cls.from_codes(codes, scales, None if symmetric else zeros.to(torch.uint8), bits=bits, group_size=group_size)

    @classmethod
    def between_extremes(cls, matrix: Tensor, *, bits: int, group_size: int) -> Uniform:
        """`matrix [rows, columns]` rounded on min-max grids with fp16 scales and real fp16 zero points; zero need not lie inside."""
        scales, zeros = fit_extremes(matrix, bits, group_size)
        columns = matrix.shape[1]
        groups = torch.nn.functional.pad(matrix, (0, -columns % group_size)).unflatten(1, (-1, group_size))
        ratios = (groups / scales.float()[..., None]).add_(zeros.float()[..., None])
        codes = ratios.round_().clamp_(0, 2**bits - 1).to(torch.uint8).flatten(1)[:, :columns]
        return cls.from_codes(codes, scales, zeros, bits=bits, group_size=group_size)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def unpacked_codes(self) -> Tensor:
        """uint8 `[rows, columns]`."""
        return unpack(self.codes, self.bits_per_code, self.columns)

    def unpacked_zero_points(self) -> Tensor:
        """float32, the shape of the scales (one value for the symmetric grid)."""
        if self.zero_points is None:
            return torch.full((1, 1), float(2 ** (self.bits_per_code - 1)), device=self.codes.device)
        if isinstance(self.zero_points, Term) or self.zero_points.is_floating_point():
            return stored_numbers(self.zero_points)
        return unpack(self.zero_points, self.bits_per_code, self.scales.shape[1]).float()

    def described(self) -> Description | None:
        if self.bits_per_code > 8:
            return None
        zeros: Description | None
        if isinstance(self.zero_points, Tensor) and not self.zero_points.is_floating_point():
            zeros = packed(self.zero_points, self.scales.shape[1])
        else:
            zeros = describe_numbers(self.zero_points)
        scales = describe_numbers(self.scales)
        if scales is None or zeros is None:
            return None
        return coded((self.rows, self.columns, self.bits_per_code, self.group_size), self.codes, ABSENT, scales, zeros)

    def define(self, dtype: torch.dtype = torch.float32) -> Tensor:
        scales, zeros = (
            spread_groups(values, self.group_size, self.columns) for values in (stored_numbers(self.scales), self.unpacked_zero_points())
        )
        return ((self.unpacked_codes().float() - zeros) * scales).to(dtype)

    def stacked(self, below: Term) -> Term | None:
        same = isinstance(below, Uniform) and self._alike(below) and below.columns == self.columns
        if not same or any(one.scales.shape[0] != one.rows for one in (self, below) if isinstance(one, Uniform)):
            return None
        return self._joined(cast(Uniform, below), 0, self.zero_points)

    def widened(self, beside: Term) -> Term | None:
        same = (
            isinstance(beside, Uniform)
            and self._alike(beside)
            and beside.rows == self.rows
            and beside.scales.shape[0] == self.scales.shape[0]
        )
        # Behind a part of a group, or of a byte, nothing can be put without being written anew.
        if not same or self.columns % self.group_size or self.columns * self.bits_per_code % 8:
            return None
        zeros = self.zero_points
        whole = zeros is None or cast(Tensor, zeros).is_floating_point() or self.scales.shape[1] * self.bits_per_code % 8 == 0
        return self._joined(cast(Uniform, beside), 1, zeros) if whole else None

    def taken(self, rows: Tensor) -> Uniform:
        zeros = None if self.zero_points is None else taken_rows(self.zero_points, rows)
        codes, scales = self.codes.index_select(0, rows), taken_rows(self.scales, rows)
        return Uniform(codes, scales, zeros, len(rows), self.columns, self.bits_per_code, self.group_size)

    def _alike(self, other: Uniform) -> bool:
        """Whether both are of one width, group size and kind of stored numbers."""
        if (self.bits_per_code, self.group_size) != (other.bits_per_code, other.group_size):
            return False
        pairs = ((self.scales, other.scales), (self.zero_points, other.zero_points))
        return all(
            (one is None and two is None) or (isinstance(one, Tensor) and isinstance(two, Tensor) and one.dtype == two.dtype)
            for one, two in pairs
        )

    def _joined(self, other: Uniform, axis: int, zeros: Tensor | Term | None) -> Uniform:
        scales = torch.cat([cast(Tensor, self.scales), cast(Tensor, other.scales)], axis)
        together = None if zeros is None else torch.cat([cast(Tensor, zeros), cast(Tensor, other.zero_points)], axis)
        rows, columns = (self.rows + other.rows, self.columns) if axis == 0 else (self.rows, self.columns + other.columns)
        codes = torch.cat([self.codes, other.codes], axis)
        return Uniform(codes, scales, together, rows, columns, self.bits_per_code, self.group_size)
