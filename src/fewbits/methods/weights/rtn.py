"""Round to nearest: the baseline of every weight method."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.core.checks import check_group_size, check_range
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.dense import Dense
from fewbits.formats.ranges import Search, fit_groups, fit_uniform, round_codes
from fewbits.formats.uniform import Uniform


@dataclass(frozen=True)
class Rtn(LayerMethod):
    """Each weight goes to the nearest level of its group's grid; no data is used.

    A group size of 0 is one group for the whole matrix; 16 bits are fp16, in which numbers are rounded to nearest as well.
    Stored: one uniform term with fp16 scales and integer zero points (none if symmetric), or the weights in fp16. Raises
    InputError for bits outside 1 to 8 other than 16, or a group size below 0.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    search: Search = "minmax"

    paper: ClassVar[Paper] = Paper("Quantizing deep convolutional networks for efficient inference: a whitepaper", "1806.08342", 2018)

    def __post_init__(self) -> None:
        if self.bits != 16:
            check_range("bits", self.bits, 1, 8)
        check_group_size(self.group_size or None)

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        if self.bits == 16:
            return CompressedTensor((Dense(weight.half()),))
        if self.group_size == 0:
            return self._whole(weight)
        columns = weight.shape[1]
        size = min(self.group_size or columns, columns)
        scales, zeros = fit_groups(weight, self.bits, size, symmetric=self.symmetric, search=self.search)
        return CompressedTensor((Uniform.nearest(weight, scales, zeros, bits=self.bits, group_size=size, symmetric=self.symmetric),))

    def _whole(self, weight: Tensor) -> CompressedTensor:
        """One scale and zero point, rounded to fp16 and a whole number before the codes are chosen."""
        scale, zero = fit_uniform(weight.reshape(1, -1), self.bits, symmetric=self.symmetric, search=self.search)
        scale = scale.half()
        codes = round_codes(weight, scale.float(), zero, self.bits).to(torch.uint8)
        zero_points = None if self.symmetric else zero.to(torch.uint8)
        return CompressedTensor((Uniform.from_codes(codes, scale, zero_points, bits=self.bits),))
