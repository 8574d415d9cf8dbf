"""Round to nearest: the baseline of every weight method."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.ranges import fit_groups, round_codes
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
    search: str = "minmax"

    paper: ClassVar[Paper] = Paper("Quantizing deep convolutional networks for efficient inference: a whitepaper", "1806.08342", 2018)

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise InputError(f"bits={self.bits} is out of range; 1 to 8 would be right")
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"group_size={self.group_size} is out of range; 1 or more, or none for whole rows, would be right")

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        columns = weight.shape[1]
        size = min(self.group_size or columns, columns)
        options: dict[str, Any] = {"symmetric": self.symmetric, "search": self.search}
        scales, zeros = fit_groups(weight, self.bits, size, **options)
        scales = scales.half().float()  # what will be stored is what is rounded with
        wide_scales, wide_zeros = (values.repeat_interleave(size, dim=1)[:, :columns] for values in (scales, zeros))
        codes = round_codes(weight, wide_scales, wide_zeros, self.bits).to(torch.uint8)
        zero_points = None if self.symmetric else zeros.to(torch.uint8)
        return CompressedTensor((Uniform.from_codes(codes, scales.half(), zero_points, bits=self.bits, group_size=size),))
