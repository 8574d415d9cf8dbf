"""Inputs of a linear layer in few bits, on levels spaced by a power function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.tensor import Part
from fewbits.formats.power import largest_code, power_map


@dataclass(frozen=True, eq=False)
class PowerQuantizer(Part, kind="power_quantizer"):
    """Each token's largest magnitude reaches the last level; `exponent` (float32, [1]) is the layer's.

    Raises InputError for bits outside 2 to 8.
    """

    exponent: Tensor
    bits_per_value: int = 8

    def __post_init__(self) -> None:
        largest_code(self.bits_per_value)

    def apply(self, inputs: Tensor) -> Tensor:
        """`inputs [..., features]` rounded, in the same dtype."""
        most, wide = largest_code(self.bits_per_value), inputs.float()
        maxima = wide.abs().amax(-1, keepdim=True)
        codes = torch.round(most * power_map(wide / maxima.clamp(min=1e-30), self.exponent))
        return (maxima * power_map(codes / most, 1 / self.exponent)).to(inputs.dtype)
