"""HQQ: zero points that make the rounding error sparse, found in seconds without data."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.core.checks import check_group_size, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.uniform import Uniform


@dataclass(frozen=True)
class Hqq(LayerMethod):
    """Half-quadratic splitting of sum |W - dequantized(W)|**norm, norm < 1, over the zero points; scales stay min-max.

    Alternates a shrinkage step, which takes the large errors for outliers, with the zero point that fits the rest in least
    squares; stops when the mean error no longer falls. Stored: one uniform term with fp16 scales and real fp16 zero points.
    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023 (a technical report).
    Raises InputError for values out of range.
    """

    bits: int = 4
    group_size: int | None = 64
    norm: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    iterations: int = 20

    paper: ClassVar[Paper] = Paper("Half-Quadratic Quantization of Large Machine Learning Models", None, 2023)
    baseline: ClassVar[str | None] = "rtn"

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_group_size(self.group_size)
        if not 0 < self.norm <= 1 or self.beta <= 0 or self.growth < 1 or self.iterations < 0:
            raise InputError(
                f"norm={self.norm}, beta={self.beta}, growth={self.growth} or iterations={self.iterations} is out of range; "
                "0 to 1, above 0, 1 or more and 0 or more would be right"
            )

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        columns = weight.shape[1]
        size = min(self.group_size or columns, columns)
        fitted = [self._fit(group) for group in weight.split(size, dim=1)]
        codes, scales, zeros = (torch.cat(parts, dim=1) for parts in zip(*fitted, strict=True))
        return CompressedTensor((Uniform.from_codes(codes, scales, zeros, bits=self.bits, group_size=size),))

    def _fit(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[rows, columns]`, fp16 scales and zero points `[rows, 1]` of one group."""
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scale = ((high - low) / (2**self.bits - 1)).half().float()
        scale = torch.where(scale == 0, torch.where(high == 0, 1.0, high.abs()).half().float(), scale)
        zero = -low / scale
        best, least, beta = zero, torch.inf, self.beta
        for _ in range(self.iterations + 1):
            codes = self._codes(weight, scale, zero)
            error = weight - (codes - zero) * scale
            if float(error.abs().mean()) >= least:
                break
            best, least = zero, float(error.abs().mean())
            outliers = _shrink(error, beta, self.norm)
            zero = (codes - (weight - outliers) / scale).mean(1, keepdim=True)
            beta *= self.growth
        best = best.half()
        return self._codes(weight, scale, best.float()).to(torch.uint8), scale.half(), best

    def _codes(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest codes on a grid whose zero point is no whole number: it is added before rounding."""
        return torch.clamp(torch.round(weight / scale + zero), 0, 2**self.bits - 1)


def _shrink(values: Tensor, beta: float, norm: float) -> Tensor:
    """The proximal step of |x|**norm / beta: small values to zero, large ones almost unchanged."""
    threshold = values.abs().clamp(min=1e-12).pow(norm - 1) / beta
    return values.sign() * (values.abs() - threshold).clamp(min=0)
