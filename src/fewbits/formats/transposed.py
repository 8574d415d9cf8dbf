"""Another term, turned: what it stores by rows becomes columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.tensor import Term


@dataclass(frozen=True, eq=False)
class Transposed(Term, kind="transposed"):
    """The transpose of `term`: shape `[term's columns, term's rows]`.

    The second level of a two-level grid lies so: scales of consecutive rows share one grid, where a `Uniform` of scales by
    itself would join consecutive columns.
    """

    term: Term

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.term.shape
        return columns, rows

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.term.decode(dtype).T.contiguous()
