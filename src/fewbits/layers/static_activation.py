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
    """Rounding to multiples of `scale` (float32, [1]); what is larger than the grid reaches is cut off.

    The grid is symmetric, or, not `signed`, starts at zero and has twice the levels above it.
    """

    scale: Tensor
    bits_per_value: int = 8
    signed: bool = True

    @classmethod
    def for_largest(cls, magnitude: Tensor, bits: int, *, signed: bool = True) -> Self:
        """The grid that reaches `magnitude`. Raises InputError for bits outside 2 to 16 or a magnitude that is not finite."""
        if not 2 <= bits <= 16:
            raise InputError(f"activations of {bits} bits are out of range; 2 to 16 would be right")
        if not bool(torch.isfinite(magnitude)):
            raise InputError("the largest input is not finite; calibration tokens would be right")
        most = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        return cls((magnitude.float() / most).clamp(min=1e-30).reshape(1), bits, signed)

    def apply(self, inputs: Tensor) -> Tensor:
        """`inputs [..., features]` rounded, in the same dtype."""
        most = 2 ** (self.bits_per_value - 1) - 1 if self.signed else 2**self.bits_per_value - 1
        return ((inputs.float() / self.scale).round().clamp(-most if self.signed else 0, most) * self.scale).to(inputs.dtype)
