"""BitStack: residual blocks of about one bit a weight, of which as many are loaded as memory has room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.core.checks import check_range
from fewbits.core.errors import InputError, NumericsError
from fewbits.core.method import LayerMethod, Paper, Stacking, Statistics
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.diagonal import DiagonalScale
from fewbits.solvers.peel import peel_products, peel_signs
from fewbits.statistics.sequence_norms import SequenceNorms

_LEAST = 1e-3  # what is added to a feature's norm


@dataclass(frozen=True)
class Bitstack(LayerMethod):
    """W diag(a) = sum over blocks of sign(R) * (A B), R what the blocks before leave, A B the best product of `block_rank` to |R|.

    a is a feature's norm over a sequence, the mean of all sequences, one for all linears that read an input. When all layers
    are stored their blocks are ranked on `order_windows` of the calibration text by the perplexity that one more block of one
    layer gives (`order="random"`: drawn, for comparison); any number of blocks is loaded from there. Stored: for each block
    packed signs and fp16 factors, 1 + 16 rank (rows + columns) / (rows columns) bits a weight; an fp16 scale of the input, which
    moves into a norm where there is one; the order in config.json. A rank is at most the matrix's smaller side over
    `side_a_rank`, so that factors stay small. `decomposition="svd"` takes plain products of the same bytes, for comparison.
    Departures: see the page. Raises InputError for values out of range.
    """

    block_rank: int = 16
    side_a_rank: int = 128
    blocks: int = 6
    scale: bool = True
    decomposition: Literal["signs", "svd"] = "signs"
    order: Literal["average", "random"] = "average"
    order_windows: int = 8
    seed: int = 0

    paper: ClassVar[Paper] = Paper(
        "BitStack: Any-Size Compression of Large Language Models in Variable Memory Environments", "2410.23918", 2024
    )
    baseline: ClassVar[str | None] = "rtn"
    needs: ClassVar = (SequenceNorms,)
    inputs: ClassVar[Literal["propagated", "original"]] = "original"

    def __post_init__(self) -> None:
        check_range("block_rank", self.block_rank, 1, 10**4)
        check_range("side_a_rank", self.side_a_rank, 1, 10**5)
        check_range("blocks", self.blocks, 1, 16)
        check_range("order_windows", self.order_windows, 1, 10**6)
        if self.decomposition not in ("signs", "svd"):
            raise InputError(f"decomposition={self.decomposition!r} is not known; 'signs' or 'svd' would be right")
        if self.order not in ("average", "random"):
            raise InputError(f"order={self.order!r} is not known; 'average' or 'random' would be right")

    def stacking(self) -> Stacking:
        return Stacking(self.order, self.order_windows, self.seed)

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        inverse = input_scale(statistics[SequenceNorms].mean) if self.scale else None
        scaled = weight if inverse is None else weight / inverse.float()
        if not bool(torch.isfinite(scaled).all()):
            raise NumericsError("the scaled weight is not finite")
        rank = max(1, min(self.block_rank, min(weight.shape) // self.side_a_rank))
        return CompressedTensor(self._blocks(scaled, rank), () if inverse is None else (DiagonalScale(inverse),))

    def _blocks(self, weight: Tensor, rank: int) -> tuple[Term, ...]:
        if self.decomposition == "signs":
            return peel_signs(weight, rank, self.blocks)
        rows, columns = weight.shape
        as_large = rank + round(rows * columns / (16 * (rows + columns)))  # the factors that the signs would pay for
        return peel_products(weight, min(as_large, rows, columns), self.blocks)


def input_scale(norms: Tensor) -> Tensor:
    """What the inputs are multiplied by, 1 / a, fp16 `[features]`, for the features' norms.

    a is divided by its geometric mean, which changes nothing but keeps scales and factors in the middle of fp16's range.
    """
    wide = norms.double() + _LEAST
    return (wide.log().mean().exp() / wide).clamp(1e-4, 6e4).half()
