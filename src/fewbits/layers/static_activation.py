"""Inputs of a linear layer in few bits, on a grid that was found once and for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Part


@dataclass(frozen=True, eq=False)
class StaticQuantizer(Part, kind="static_quantizer"):
    """Symmetric rounding to multiples of `scale` (float32, [1]); what is larger than the grid reaches is cut off."""

    scale: Tensor
    bits_per_value: int = 8

    @classmethod
    def for_largest(cls, magnitude: Tensor, bits: int) -> Self:
        """The grid that reaches `magnitude`. Raises InputError for bits outside 2 to 16 or a magnitude that is not finite."""
        if not 2 <= bits <= 16:
            raise InputError(f"activations of {bits} bits are out of range; 2 to 16 would be right")
        if not bool(torch.isfinite(magnitude)):
            raise InputError("the largest input is not finite; calibration tokens would be right")
        return cls((magnitude.float() / (2 ** (bits - 1) - 1)).clamp(min=1e-30).reshape(1), bits)

    def apply(self, inputs: Tensor) -> Tensor:
        """`inputs [..., features]` rounded, in the same dtype."""
        most = 2 ** (self.bits_per_value - 1) - 1
        return ((inputs.float() / self.scale).round().clamp(-most, most) * self.scale).to(inputs.dtype)
