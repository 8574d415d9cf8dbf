"""Numbers in another order: blocks of a tensor's memory, each a matrix, the other way round."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewbits.kernels import native

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def whole_numbers(tensor: Tensor, item: int) -> Tensor:
    """`[..., bytes]` as whole numbers of `item` bytes, 1, 2 or 4."""
    return tensor.view(_WHOLE[item])


def transpose_blocks(tensor: Tensor, sizes: tuple[int, int], item: int, room: Callable[[Tensor], Tensor] = torch.empty_like) -> Tensor:
    """A tensor like a contiguous one, in what `room` gives for it, that holds each block of `sizes` rows and columns transposed.

    A block is `rows * columns` numbers of `item` bytes, 1, 2 or 4, which lie one after another; the tensor is a whole number of them.
    """
    found = room(tensor)
    if native.transposes(tensor):
        native.transpose_blocks(tensor, found, sizes, item)
        return found
    rows, columns = sizes
    source, target = (whole_numbers(one.view(-1), item) for one in (tensor, found))
    target.view(-1, columns, rows).copy_(source.view(-1, rows, columns).mT)
    return found
