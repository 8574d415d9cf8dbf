"""Rows of two kinds: a bit says of each row, for every block of columns, in which of two terms it lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term
from fewbits.formats.packing import pack, unpack


@dataclass(frozen=True, eq=False)
class RowClasses(Term, kind="row_classes"):
    """Of a block's rows the chosen ones are the rows of `chosen` in their order, the others those of `others`.

    `flags [blocks, bytes]` are packed, a set bit is a chosen row; columns are cut into equally many for each block. The blocks
    choose equally many rows but not the same ones, so that a row of `chosen` may hold other rows in other blocks. A class
    without rows is None. Made by `from_mask`, of what `rows_of` gathers. Raises InputError where shapes do not fit.
    """

    flags: Tensor
    chosen: Term | None
    others: Term | None
    rows: int

    def __post_init__(self) -> None:
        terms = [term for term in (self.chosen, self.others) if term is not None]
        widths = {term.shape[1] for term in terms}
        if len(widths) != 1 or sum(term.shape[0] for term in terms) != self.rows or widths.pop() % len(self.flags):
            raise InputError(f"classes {[tuple(term.shape) for term in terms]} do not make {self.rows} rows in {len(self.flags)} blocks")

    @classmethod
    def from_mask(cls, mask: Tensor, chosen: Term | None, others: Term | None) -> RowClasses:
        """`mask [blocks, rows]`, bool. Raises InputError where it does not choose the rows that `chosen` has in every block."""
        count = 0 if chosen is None else chosen.shape[0]
        if bool((mask.sum(1) != count).any()):
            raise InputError(f"the blocks choose {mask.sum(1).tolist()} rows where the chosen class has {count}")
        return cls(pack(mask.to(torch.uint8), 1), chosen, others, mask.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        term = self.others if self.chosen is None else self.chosen
        assert term is not None
        return self.rows, term.shape[1]

    def mask(self) -> Tensor:
        """bool `[blocks, rows]`."""
        return unpack(self.flags, 1, self.rows).bool()

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        mask, blocks = self.mask(), len(self.flags)
        whole = torch.empty((blocks, self.rows, self.shape[1] // blocks), dtype=dtype, device=mask.device)
        for where, term in ((mask, self.chosen), (~mask, self.others)):
            if term is not None:
                whole[where] = term.decode(dtype).unflatten(1, (blocks, -1)).transpose(0, 1).flatten(0, 1)
        return whole.transpose(0, 1).flatten(1)


def rows_of(matrix: Tensor, mask: Tensor) -> Tensor:
    """`[count, columns]`: of `matrix [rows, columns]` the rows that every block of `mask [blocks, rows]` chooses, side by side."""
    blocks = len(mask)
    found = matrix.unflatten(1, (blocks, -1)).transpose(0, 1)[mask]
    return found.unflatten(0, (blocks, -1)).transpose(0, 1).flatten(1)
