"""A matrix taken apart into residual blocks, any number of which from the first on approximates it.

Source: BitStack (arXiv 2410.23918), section 3.1 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from fewbits.core.tensor import Term
from fewbits.formats.dense import Dense
from fewbits.formats.lowrank import LowRank
from fewbits.formats.signed_product import SignedProduct
from fewbits.solvers.low_rank import low_rank

T = TypeVar("T", bound=Term)
_SEED = 0  # of the random projections


def peel_signs(matrix: Tensor, rank: int, blocks: int) -> tuple[SignedProduct, ...]:
    """`blocks` residual blocks of `matrix [rows, columns]` (float32): each the signs of what is left times the best product of
    `rank` to its magnitudes. What is left is what the block as stored, with fp16 factors, leaves. Raises InputError for a rank
    outside 1 to the smaller side.
    """

    def block(left_over: Tensor) -> SignedProduct:
        return SignedProduct.from_signs(left_over, *low_rank(left_over.abs(), rank, seed=_SEED))

    return tuple(_peel(matrix, blocks, block))


def peel_products(matrix: Tensor, rank: int, blocks: int) -> tuple[LowRank, ...]:
    """The same without signs, for comparison: each block is the best product of `rank` to what is left."""

    def block(left_over: Tensor) -> LowRank:
        left, right = low_rank(left_over, rank, seed=_SEED)
        return LowRank(Dense(left.half()), Dense(right.half()))

    return tuple(_peel(matrix, blocks, block))


def _peel(matrix: Tensor, blocks: int, block: Callable[[Tensor], T]) -> list[T]:
    found: list[T] = []
    for _ in range(blocks):
        found.append(block(matrix))
        matrix = matrix - found[-1].decode()
    return found
