"""Three levels for each row or group of columns, -scale, 0 and scale: five codes a byte."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term
from fewbits.formats.coded import Coded, describe_numbers, spread_groups, stored_numbers, taken_rows
from fewbits.kernels.layout import ABSENT, BASE_THREE, Description, coded

_POWERS = (1, 3, 9, 27, 81)


@dataclass(frozen=True, eq=False)
class Ternary(Coded, kind="ternary"):
    """value = sign * scale: packed signs `[rows, bytes]`, scales `[rows or 1, groups]` or None for values of -1, 0 and 1.

    Made by `from_signs`.
    """

    codes: Tensor
    scales: Tensor | Term | None
    rows: int
    columns: int
    group_size: int  # columns that share a scale; the last group may be shorter

    @classmethod
    def from_signs(cls, signs: Tensor, scales: Tensor | None = None, *, group_size: int | None = None) -> Ternary:
        """`signs [rows, columns]` of -1, 0 and 1; no group size: whole rows. Scales are stored in the dtype they come in.

        Raises InputError where shapes disagree or a scale is not finite.
        """
        rows, columns = signs.shape
        size = columns if group_size is None else group_size
        if size < 1:
            raise InputError(f"group_size={size} is out of range; it must be at least 1, or None for whole rows")
        groups = -(-columns // size)
        if scales is not None and scales.shape not in ((rows, groups), (1, groups)):
            raise InputError(
                f"scales {list(scales.shape)} do not fit signs {[rows, columns]} in groups of {size}; [{rows}, {groups}] would"
            )
        if scales is not None and not bool(torch.isfinite(scales).all()):
            raise InputError(f"a scale is not finite in {scales.dtype}; a wider dtype, or finite values, would be right")
        return cls(pack_ternary(signs), scales, rows, columns, size)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def unpacked_signs(self) -> Tensor:
        """int8 `[rows, columns]`: -1, 0 and 1."""
        return unpack_ternary(self.codes, self.columns)

    def described(self) -> Description | None:
        scales = describe_numbers(self.scales)
        if scales is None:
            return None
        return coded((self.rows, self.columns, BASE_THREE, self.group_size), self.codes, ABSENT, scales, ABSENT)

    def define(self, dtype: torch.dtype = torch.float32) -> Tensor:
        signs = self.unpacked_signs()
        if self.scales is None:
            return signs.to(dtype)
        return (signs.float() * spread_groups(stored_numbers(self.scales), self.group_size, self.columns)).to(dtype)

    def taken(self, rows: Tensor) -> Ternary:
        scales = None if self.scales is None else taken_rows(self.scales, rows)
        return Ternary(self.codes.index_select(0, rows), scales, len(rows), self.columns, self.group_size)


def pack_ternary(signs: Tensor) -> Tensor:
    """`signs [rows, columns]` of -1, 0 and 1 to uint8 `[rows, ceil(columns / 5)]`: byte = sum of (sign + 1) * 3**k.

    Zeros pad the last byte. Raises InputError for another number.
    """
    if signs.numel() and not bool((signs.abs() <= 1).all() & (signs == signs.round()).all()):
        raise InputError("signs must be -1, 0 or 1")
    digits = torch.nn.functional.pad(signs.to(torch.int8) + 1, (0, -signs.shape[1] % 5), value=1)
    powers = torch.tensor(_POWERS, dtype=torch.int16, device=signs.device)
    return (digits.unflatten(1, (-1, 5)).to(torch.int16) * powers).sum(2).to(torch.uint8)


def unpack_ternary(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_ternary`: int8 `[rows, columns]`. Raises InputError where the bytes are too many or too few."""
    if packed.shape[1] != -(-columns // 5):
        raise InputError(f"rows of {packed.shape[1]} bytes cannot hold {columns} ternary codes; {-(-columns // 5)} would")
    powers = torch.tensor(_POWERS, dtype=torch.uint8, device=packed.device)
    digits = packed[:, :, None] // powers % 3
    return digits.flatten(1)[:, :columns].to(torch.int8) - 1
