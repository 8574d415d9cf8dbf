"""Inputs of a linear layer in 8-bit floating point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Part

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True, eq=False)
class FloatQuantizer(Part, kind="float_quantizer"):
    """Rounding to E4M3 numbers times a scale: `scale` (float32, [1]), or, None, what brings the largest magnitude to 448.

    One scale for each token, or one for the whole batch. What is larger than 448 times the scale is cut off.
    Raises InputError for another granularity.
    """

    scale: Tensor | None = None
    granularity: Literal["token", "tensor"] = "token"

    def __post_init__(self) -> None:
        if self.granularity not in ("token", "tensor"):
            raise InputError(f"granularity={self.granularity!r} is not known; 'token' or 'tensor' would be right")

    def apply(self, inputs: Tensor) -> Tensor:
        """`inputs [..., features]` rounded, in the same dtype."""
        wide = inputs.float()
        if self.scale is not None:
            scale = self.scale
        else:
            magnitudes = wide.abs()
            scale = ((magnitudes.amax(-1, keepdim=True) if self.granularity == "token" else magnitudes.max()) / _LARGEST).clamp(min=1e-30)
        return ((wide / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).float() * scale).to(inputs.dtype)
