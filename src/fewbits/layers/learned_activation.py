"""Inputs of a linear layer in few bits, with a learned share of each token's range."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Part


@dataclass(frozen=True, eq=False)
class ScaledTokenQuantizer(Part, kind="scaled_token_quantizer"):
    """Symmetric rounding with a step for each token: `share` (float32, [1]) of its largest magnitude reaches the last level.

    Raises InputError for bits outside 2 to 16.
    """

    share: Tensor
    bits_per_value: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.bits_per_value <= 16:
            raise InputError(f"activations of {self.bits_per_value} bits are out of range; 2 to 16 would be right")

    def apply(self, inputs: Tensor) -> Tensor:
        """`inputs [..., features]` rounded, in the same dtype."""
        most = 2 ** (self.bits_per_value - 1) - 1
        scale = (inputs.float().abs().amax(-1, keepdim=True) * self.share / most).clamp(min=1e-30)
        return ((inputs.float() / scale).round().clamp(-most, most) * scale).to(inputs.dtype)
