"""Different terms for different input columns: the same columns for all rows, or each row's own choice of groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term
from fewbits.formats.packing import pack, unpack


@dataclass(frozen=True, eq=False)
class Columns(Term, kind="columns"):
    """Terms side by side, their columns cut into units of `unit`: unit i stands at unit `order[i]` of the matrix.

    `order [units]` is int16 up to 32768 units, else int32; None leaves the columns as they lie. The last unit of the matrix
    may be shorter, wherever it lies. Raises InputError where the terms differ in rows or the order does not name every unit once.
    """

    terms: tuple[Term, ...]
    order: Tensor | None = None
    unit: int = 1

    def __post_init__(self) -> None:
        if len({term.shape[0] for term in self.terms}) != 1:
            raise InputError(f"terms of different heights cannot stand side by side: {[tuple(term.shape) for term in self.terms]}")
        if self.order is None or self.order.is_meta:
            return
        units = -(-self.shape[1] // self.unit)
        expected = torch.arange(units, dtype=self.order.dtype, device=self.order.device)
        if self.order.shape != (units,) or not torch.equal(self.order.sort().values, expected):
            raise InputError(f"the order of {units} units of columns must hold each of 0 to {units - 1} once")

    @classmethod
    def from_order(cls, terms: tuple[Term, ...], order: Tensor, unit: int) -> Columns:
        """`order [units]` in the narrowest type that is stored."""
        return cls(terms, order.to(torch.int16 if len(order) <= 2**15 else torch.int32), unit)

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape[0], sum(term.shape[1] for term in self.terms)

    def columns(self) -> Tensor:
        """int64 `[columns]`: where in the matrix each of the terms' columns, side by side, stands."""
        count, device = self.shape[1], self.terms[0].decode().device if self.order is None else self.order.device
        if self.order is None:
            return torch.arange(count, device=device)
        places = self.order.long()[:, None] * self.unit + torch.arange(self.unit, device=device)
        return places[places < count]  # the last unit may be shorter

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        beside = torch.cat([term.decode(dtype) for term in self.terms], dim=1)
        return beside if self.order is None else torch.empty_like(beside).index_copy_(1, self.columns(), beside)

    def matmul(self, inputs: Tensor) -> Tensor:
        if self.order is not None:
            inputs = inputs[..., self.columns()]
        parts = inputs.split([term.shape[1] for term in self.terms], dim=-1)
        total = self.terms[0].matmul(parts[0])
        for term, part in zip(self.terms[1:], parts[1:], strict=True):
            total = total + term.matmul(part)
        return total


@dataclass(frozen=True, eq=False)
class Choice(Term, kind="choice"):
    """Each row takes some groups of `unit` columns from `chosen`, as many in every row, and the others from `rest`.

    `flags [rows, bytes]` packs one bit a group, 1 for `chosen`; both terms hold a row's groups in ascending order. Only a last
    group that all rows take from the same term may be shorter. Made by `from_flags`.
    """

    chosen: Term
    rest: Term
    flags: Tensor
    unit: int

    @classmethod
    def from_flags(cls, flags: Tensor, chosen: Term, rest: Term, *, unit: int) -> Choice:
        """`flags [rows, groups]`, bool. Raises InputError where rows would differ in length or the terms do not fit."""
        columns = chosen.shape[1] + rest.shape[1]
        if flags.shape != (rest.shape[0], -(-columns // unit)) or chosen.shape[0] != rest.shape[0]:
            raise InputError(f"flags {list(flags.shape)} do not fit terms {list(chosen.shape)} and {list(rest.shape)} in groups of {unit}")
        widths = _spread(flags, unit, columns).sum(1)
        if not bool((widths == chosen.shape[1]).all()):
            raise InputError(
                f"rows choose {int(widths.min())} to {int(widths.max())} columns; {chosen.shape[1]} in every row would be right"
            )
        return cls(chosen, rest, pack(flags, 1), unit)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rest.shape[0], self.chosen.shape[1] + self.rest.shape[1]

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        columns = self.shape[1]
        flags = unpack(self.flags, 1, -(-columns // self.unit)).bool()
        mask = _spread(flags, self.unit, columns)
        matrix = torch.empty(self.shape, dtype=dtype, device=self.flags.device)
        matrix[mask] = self.chosen.decode(dtype).flatten()
        matrix[~mask] = self.rest.decode(dtype).flatten()
        return matrix


def _spread(flags: Tensor, unit: int, columns: int) -> Tensor:
    return flags.repeat_interleave(unit, dim=1)[:, :columns]
