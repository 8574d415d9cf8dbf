"""Evenly spaced levels counted up from a minimum: value = code * step + minimum, for each group of columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term
from fewbits.formats.coded import Coded, describe_numbers, spread_groups, stored_numbers, taken_rows
from fewbits.formats.packing import pack, unpack
from fewbits.kernels.layout import ABSENT, MINIMUMS, Description, coded, offsets


@dataclass(frozen=True, eq=False)
class Stepped(Coded, kind="stepped"):
    """Packed codes `[rows, bytes]`, and steps and minimums `[rows, groups]`, plain numbers or terms of that shape.

    Without minimums the first level is zero. Beside `Uniform` it holds grids whose minimum is a number of its own, where a zero
    point times a scale would have to be rounded, and unsigned multiples of one scale. Made by `from_codes`.
    """

    codes: Tensor
    steps: Tensor | Term
    minimums: Tensor | Term | None
    rows: int
    columns: int
    bits_per_code: int
    group_size: int  # columns that share a step; the last group may be shorter

    @classmethod
    def from_codes(cls, codes: Tensor, steps: Tensor | Term, minimums: Tensor | Term | None, *, bits: int, group_size: int) -> Stepped:
        """`codes [rows, columns]` in 0..2**bits-1; `steps` and `minimums` `[rows, groups]`.

        Raises InputError where shapes disagree, a number is not finite, or a code does not fit.
        """
        rows, columns = codes.shape
        if group_size < 1:
            raise InputError(f"group_size={group_size} is out of range; it must be at least 1")
        expected = (rows, -(-columns // group_size))
        for name, values in (("steps", steps), ("minimums", minimums)):
            if values is None:
                continue
            if tuple(values.shape) != expected:
                raise InputError(
                    f"{name} {list(values.shape)} do not fit codes {[rows, columns]} in groups of {group_size}; {list(expected)} would"
                )
            if not bool(torch.isfinite(stored_numbers(values)).all()):
                raise InputError(f"one of the {name} is not finite; a wider dtype, or finite weights, would be right")
        return cls(pack(codes, bits), steps, minimums, rows, columns, bits, group_size)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def unpacked_codes(self) -> Tensor:
        """uint8 `[rows, columns]`."""
        return unpack(self.codes, self.bits_per_code, self.columns)

    def described(self) -> Description | None:
        steps, minimums = describe_numbers(self.steps), describe_numbers(self.minimums)
        if self.bits_per_code > 8 or steps is None or minimums is None:
            return None
        sizes = (*self.shape, self.bits_per_code, self.group_size)
        return coded(sizes, self.codes, ABSENT, steps, offsets(MINIMUMS, minimums))

    def define(self, dtype: torch.dtype = torch.float32) -> Tensor:
        values = self.unpacked_codes().float() * spread_groups(stored_numbers(self.steps), self.group_size, self.columns)
        if self.minimums is not None:
            values = values + spread_groups(stored_numbers(self.minimums), self.group_size, self.columns)
        return values.to(dtype)

    def taken(self, rows: Tensor) -> Stepped:
        steps, minimums = (None if one is None else taken_rows(one, rows) for one in (self.steps, self.minimums))
        assert steps is not None
        return replace(self, codes=self.codes.index_select(0, rows), steps=steps, minimums=minimums, rows=len(rows))
