"""Signs of all entries times a product of two thin matrices: one residual block (BitStack, arXiv 2410.23918, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.formats.coded import Described
from fewbits.kernels import layout
from fewbits.kernels.sums import Factors


@dataclass(frozen=True, eq=False)
class SignedProduct(Described, kind="signed_product"):
    """S * (left right), entry by entry, S of -1 and 1.

    Signs are one stream of bits over the whole matrix, row after row, uint8 `[(rows * columns + 7) // 8]`: 1 is plus, the first
    entry the highest bit of its byte, zeros pad the last byte. Factors `[rows, rank]` and `[rank, columns]` are fp16. Made by
    `from_signs`. Raises InputError where shapes do not fit.
    """

    signs: Tensor
    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        rows, columns = self.shape
        width = (rows * columns + 7) // 8
        if self.left.shape[1] != self.right.shape[0] or self.signs.shape != (width,):
            raise InputError(
                f"signs {list(self.signs.shape)} and factors {list(self.left.shape)}, {list(self.right.shape)} do not fit; "
                f"factors of one rank and [{width}] bytes of signs would"
            )

    @classmethod
    def from_signs(cls, values: Tensor, left: Tensor, right: Tensor) -> SignedProduct:
        """The signs of `values [rows, columns]`, that of zero being plus; factors are rounded to fp16."""
        return cls(pack_signs(values >= 0), left.half().contiguous(), right.half().contiguous())

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        product = self.left.float() @ self.right.float()
        return torch.where(unpack_signs(self.signs, self.shape), product, -product).to(dtype)

    def factors(self) -> Factors | None:
        found = layout.signed_product(self.signs, self.left, self.right)
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
