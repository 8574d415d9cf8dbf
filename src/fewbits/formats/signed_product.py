"""Signs of all entries times a product of two thin matrices: one residual block (BitStack, arXiv 2410.23918, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.formats.coded import Laid
from fewbits.kernels import layout, native
from fewbits.kernels.blocks import transpose_blocks
from fewbits.kernels.sums import Factors

_LINE_ROWS, _WORD, _WORD_COLUMNS = 16, 4, 32  # rows that share a line; bytes and columns of a row that lie together


@dataclass(frozen=True, eq=False)
class SignedProduct(Laid, kind="signed_product"):
    """S * (left right), entry by entry, S of -1 and 1.

    Signs are one stream of bits over the whole matrix, row after row, uint8 `[(rows * columns + 7) // 8]`: 1 is plus, the first
    entry the highest bit of its byte, zeros pad the last byte. Factors `[rows, rank]` and `[rank, columns]` are fp16. Made by
    `from_signs`. Raises InputError where shapes do not fit.

    Where they are `lines`, signs lie in another order of the same bytes: of sixteen rows the first 32 signs of each, then the next 32.
    So kernels read them that look signs of sixteen rows up at once.
    """

    laid: ClassVar[str] = "signs"

    signs: Tensor
    left: Tensor
    right: Tensor
    lines: bool = False

    def __post_init__(self) -> None:
        rows, columns = self.shape
        width = (rows * columns + 7) // 8
        if self.left.shape[1] != self.right.shape[0] or self.signs.shape != (width,):
            raise InputError(
                f"signs {list(self.signs.shape)} and factors {list(self.left.shape)}, {list(self.right.shape)} do not fit; "
                f"factors of one rank and [{width}] bytes of signs would"
            )
        if self.lines and not self._has_lines:
            raise InputError(f"signs of shape {[rows, columns]} cannot lie in lines; multiples of {[_LINE_ROWS, _WORD_COLUMNS]} can")

    @classmethod
    def from_signs(cls, values: Tensor, left: Tensor, right: Tensor) -> SignedProduct:
        """The signs of `values [rows, columns]`, that of zero being plus; factors are rounded to fp16."""
        return cls(pack_signs(values >= 0), left.half().contiguous(), right.half().contiguous())

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def _has_lines(self) -> bool:
        """Whether lines are an order of these signs: of whole words of sixteen rows."""
        return self.shape[0] % _LINE_ROWS == 0 and self.shape[1] % _WORD_COLUMNS == 0

    def may_lie_in_lines(self) -> bool:
        if self.lines or not self._has_lines:
            return False
        found = layout.signed_product(self.signs, self.left, self.right, lines=True)
        if found is None or any(tensor.device.type != "cpu" or not tensor.is_contiguous() for tensor in found.tensors):
            return False
        return native.reads_lines(found.tensors, found.layout)

    def in_lines(self, room: Callable[[Tensor], Tensor] = torch.empty_like) -> SignedProduct:
        if self.lines or not self._has_lines:
            return self
        return replace(self, signs=transpose_blocks(self.signs, (_LINE_ROWS, self._words), _WORD, room), lines=True)

    def in_rows(self) -> SignedProduct:
        return replace(self, signs=self._signs_by_rows(), lines=False) if self.lines else self

    @property
    def _words(self) -> int:
        return self.shape[1] // _WORD_COLUMNS

    def _signs_by_rows(self) -> Tensor:
        return transpose_blocks(self.signs, (self._words, _LINE_ROWS), _WORD) if self.lines else self.signs

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        product = self.left.float() @ self.right.float()
        return torch.where(unpack_signs(self._signs_by_rows(), self.shape), product, -product).to(dtype)

    def factors(self) -> Factors | None:
        found = layout.signed_product(self.signs, self.left, self.right, lines=self.lines)
        return None if found is None else (found,)


def pack_signs(plus: Tensor) -> Tensor:
    """Bool of any shape to uint8 `[(count + 7) // 8]`, the first entry in the highest bit, padded by zeros."""
    flat = plus.flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (bits << _shifts(bits)).sum(1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_signs`: bool of `shape`."""
    bits = (packed[:, None] >> _shifts(packed)) & 1
    return bits.flatten()[: torch.Size(shape).numel()].view(shape).bool()


def _shifts(packed: Tensor) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
