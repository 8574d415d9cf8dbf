"""Round to nearest: the baseline of every weight method."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbits.core.checks import check_group_size, check_range
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.ranges import Search, fit_groups
from fewbits.formats.uniform import Uniform


@dataclass(frozen=True)
class Rtn(LayerMethod):
    """Each weight goes to the nearest level of its group's grid; no data is used.

    Stored: one uniform term with fp16 scales and integer zero points (none if symmetric). Raises InputError for bits outside
    1 to 8 or a group size below 1.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    search: Search = "minmax"

    paper: ClassVar[Paper] = Paper("Quantizing deep convolutional networks for efficient inference: a whitepaper", "1806.08342", 2018)

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_group_size(self.group_size)

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        columns = weight.shape[1]
        size = min(self.group_size or columns, columns)
        scales, zeros = fit_groups(weight, self.bits, size, symmetric=self.symmetric, search=self.search)
        return CompressedTensor((Uniform.nearest(weight, scales, zeros, bits=self.bits, group_size=size, symmetric=self.symmetric),))
