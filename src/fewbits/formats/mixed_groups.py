"""Uniform grids of two widths in one matrix: each row says which of its groups of columns are wide."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term
from fewbits.formats.coded import Described, describe_numbers
from fewbits.formats.packing import pack, unpack
from fewbits.kernels import layout
from fewbits.kernels.sums import Factors


@dataclass(frozen=True, eq=False)
class MixedGroups(Described, kind="mixed_groups"):
    """value = (code - zero) * scale; of each row's groups equally many are wide, one flag bit a group says which.

    `narrow` and `wide` hold the codes of a row's groups in their order, packed; scales and zero points are terms
    `[rows, groups]`. Made by `from_codes`.
    """

    narrow: Tensor
    wide: Tensor
    flags: Tensor
    scales: Term
    zero_points: Term
    columns: int
    narrow_bits: int
    wide_bits: int
    group_size: int

    @classmethod
    def from_codes(
        cls, codes: Tensor, chosen: Tensor, scales: Term, zero_points: Term, *, widths: tuple[int, int], group_size: int
    ) -> MixedGroups:
        """`codes [rows, columns]` uint8; `chosen [rows, groups]` bool: the wide groups; `widths`: bits of narrow and wide codes.

        Raises InputError where groups do not divide the columns or rows differ in their number of wide groups.
        """
        rows, columns = codes.shape
        if columns % group_size or chosen.shape != (rows, columns // group_size):
            raise InputError(f"groups of {group_size} and a choice {list(chosen.shape)} do not fit codes {[rows, columns]}")
        if len(chosen.sum(1).unique()) > 1:
            raise InputError("rows choose different numbers of wide groups; equal numbers would be right")
        at = chosen.repeat_interleave(group_size, dim=1)
        narrow, wide = (pack(codes[mask].view(rows, -1), bits) for mask, bits in ((~at, widths[0]), (at, widths[1])))
        return cls(narrow, wide, pack(chosen.to(torch.uint8), 1), scales, zero_points, columns, *widths, group_size)

    @property
    def shape(self) -> tuple[int, int]:
        return self.flags.shape[0], self.columns

    def unpacked_codes(self) -> Tensor:
        """uint8 `[rows, columns]`."""
        chosen = unpack(self.flags, 1, self.columns // self.group_size).bool()
        at = chosen.repeat_interleave(self.group_size, dim=1)
        count = int(at[0].sum())
        codes = torch.empty(self.shape, dtype=torch.uint8, device=self.flags.device)
        codes[~at] = unpack(self.narrow, self.narrow_bits, self.columns - count).flatten()
        codes[at] = unpack(self.wide, self.wide_bits, count).flatten()
        return codes

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        scales, zeros = (one.decode().repeat_interleave(self.group_size, dim=1) for one in (self.scales, self.zero_points))
        return ((self.unpacked_codes().float() - zeros) * scales).to(dtype)

    def factors(self) -> Factors | None:
        scales, zeros = describe_numbers(self.scales), describe_numbers(self.zero_points)
        # A row's bytes say how many groups are wide where a group fills a byte; the flags are not read for it, which would be slow.
        if scales is None or zeros is None or not self.flags.numel() or self.group_size * self.wide_bits < 8:
            return None
        wide = 8 * self.wide.shape[1] // (self.wide_bits * self.group_size)
        sizes = (self.narrow_bits, self.wide_bits, wide)
        return (layout.mixed_groups((self.narrow, self.wide, self.flags), self.columns, self.group_size, sizes, (scales, zeros)),)
