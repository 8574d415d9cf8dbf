"""Two levels for each row or group of columns: value = offset + scale * sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.formats.coded import Coded, describe_numbers, spread_groups, taken_rows
from fewbits.formats.packing import pack, unpack
from fewbits.kernels.layout import ABSENT, SIGNS, Description, coded, offsets


@dataclass(frozen=True, eq=False)
class Binary(Coded, kind="binary"):
    """Packed sign bits `[rows, bytes]` (1 is plus), scales and offsets, both `[rows or 1, groups]` or None.

    No scales: the values are -1 and 1; no offsets: the levels lie around zero. Made by `from_signs`.
    """

    signs: Tensor
    scales: Tensor | None
    offsets: Tensor | None
    rows: int
    columns: int
    group_size: int  # columns that share a scale; the last group may be shorter

    @classmethod
    def from_signs(
        cls, signs: Tensor, scales: Tensor | None = None, offsets: Tensor | None = None, *, group_size: int | None = None
    ) -> Binary:
        """`signs [rows, columns]`: true, or any number of zero or more, is plus; no group size: whole rows.

        Scales and offsets are stored in the dtype they come in. Raises InputError where shapes disagree, there are offsets
        without scales, or a scale or offset is not finite.
        """
        rows, columns = signs.shape
        size = columns if group_size is None else group_size
        if size < 1 and columns:
            raise InputError(f"group_size={size} is out of range; it must be at least 1, or None for whole rows")
        groups = -(-columns // max(size, 1))
        if scales is None and offsets is not None:
            raise InputError("offsets without scales would stand around levels of -1 and 1; scales as well would be right")
        for name, values in (("scales", scales), ("offsets", offsets)):
            if values is None:
                continue
            if values.shape not in ((rows, groups), (1, groups)):
                raise InputError(
                    f"{name} {list(values.shape)} do not fit signs {[rows, columns]} in groups of {size}; [{rows}, {groups}] would"
                )
            if not bool(torch.isfinite(values).all()):
                raise InputError(f"one of the {name} is not finite in {values.dtype}; a wider dtype, or finite weights, would be right")
        plus = signs if signs.dtype == torch.bool else signs >= 0
        return cls(pack(plus.to(torch.uint8), 1), scales, offsets, rows, columns, size)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def unpacked_signs(self) -> Tensor:
        """float32 `[rows, columns]`: -1 and 1."""
        return unpack(self.signs, 1, self.columns).float() * 2 - 1

    def described(self) -> Description | None:
        scales, added = describe_numbers(self.scales), describe_numbers(self.offsets)
        if scales is None or added is None or not self.columns:
            return None
        return coded((self.rows, self.columns, 1, self.group_size), self.signs, ABSENT, scales, offsets(SIGNS, added))

    def define(self, dtype: torch.dtype = torch.float32) -> Tensor:
        values = self.unpacked_signs()
        if self.scales is not None:
            values = values * spread_groups(self.scales.float(), self.group_size, self.columns)
        if self.offsets is not None:
            values = values + spread_groups(self.offsets.float(), self.group_size, self.columns)
        return values.to(dtype)

    def taken(self, rows: Tensor) -> Binary:
        scales, offsets = (None if one is None else cast(Tensor, taken_rows(one, rows)) for one in (self.scales, self.offsets))
        return Binary(self.signs.index_select(0, rows), scales, offsets, len(rows), self.columns, self.group_size)
