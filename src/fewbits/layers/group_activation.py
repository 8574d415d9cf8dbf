"""Inputs of a linear layer in few bits, with a scale for each token and group of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Part


@dataclass(frozen=True, eq=False)
class GroupQuantizer(Part, kind="group_quantizer"):
    """Symmetric rounding of activations as they come: each token's group of features reaches 2**(bits-1) - 1.

    Raises InputError for bits outside 2 to 16 or a group size below 1.
    """

    bits_per_value: int = 8
    group_size: int = 128

    def __post_init__(self) -> None:
        if not 2 <= self.bits_per_value <= 16 or self.group_size < 1:
            given = f"activations of {self.bits_per_value} bits in groups of {self.group_size}"
            raise InputError(f"{given} are out of range; 2 to 16 bits, and groups of 1 or more, would be right")

    def codes(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Whole numbers, as floats of the shape of `inputs [..., features]`, and scales float32 `[..., groups]`."""
        most = 2 ** (self.bits_per_value - 1) - 1
        parts = inputs.float().split(self.group_size, dim=-1)
        scales = torch.stack([(part.abs().amax(-1) / most).clamp(min=1e-30) for part in parts], dim=-1)
        codes = [(part / scale[..., None]).round() for part, scale in zip(parts, scales.unbind(-1), strict=True)]
        return torch.cat(codes, dim=-1), scales

    def apply(self, inputs: Tensor) -> Tensor:
        """`inputs` rounded, in the same dtype."""
        codes, scales = self.codes(inputs)
        return (codes * scales.repeat_interleave(self.group_size, dim=-1)[..., : inputs.shape[-1]]).to(inputs.dtype)
