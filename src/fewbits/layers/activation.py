"""Inputs of a linear layer in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Part


@dataclass(frozen=True, eq=False)
class TokenQuantizer(Part, kind="token_quantizer"):
    """Symmetric rounding of activations as they come: one scale for each token, or one for the whole batch.

    The scale brings the largest magnitude to 2**(bits-1) - 1. Raises InputError for bits outside 2 to 16.
    """

    bits_per_value: int = 8
    granularity: Literal["token", "tensor"] = "token"

    def __post_init__(self) -> None:
        if not 2 <= self.bits_per_value <= 16:
            raise InputError(f"activations of {self.bits_per_value} bits are out of range; 2 to 16 would be right")
        if self.granularity not in ("token", "tensor"):
            raise InputError(f"granularity={self.granularity!r} is not known; 'token' or 'tensor' would be right")

    def apply(self, inputs: Tensor) -> Tensor:
        """`inputs [..., features]` rounded, in the same dtype."""
        magnitudes = inputs.float().abs()
        largest = magnitudes.amax(-1, keepdim=True) if self.granularity == "token" else magnitudes.max()
        scale = (largest / (2 ** (self.bits_per_value - 1) - 1)).clamp(min=1e-30)
        return ((inputs.float() / scale).round() * scale).to(inputs.dtype)
