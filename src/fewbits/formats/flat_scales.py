"""Scales that are themselves written in few bits, counted through a matrix row by row (double quantization)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.checks import check_range
from fewbits.core.errors import InputError
from fewbits.core.tensor import Term
from fewbits.formats.packing import pack, unpack

_SMALLEST = 2.0**-24  # share of the largest scale that a scale is at least


@dataclass(frozen=True, eq=False)
class FlatScales(Term, kind="flat_scales"):
    """value = codes * steps[group] + offset, of a matrix `[rows, columns]` read row by row.

    Packed codes `[1, bytes]`, one step for every `group_size` values in that order, across rows, in a 16- or 32-bit float, and
    one float32 offset `[1]`. Made by `nearest`. QLoRA's double quantization (arXiv 2305.14314, section 3) as LQ-LoRA writes it.
    """

    codes: Tensor
    steps: Tensor
    offset: Tensor
    rows: int
    columns: int
    bits_per_code: int
    group_size: int

    @classmethod
    def nearest(cls, scales: Tensor, *, bits: int, group_size: int, dtype: torch.dtype = torch.float16) -> FlatScales:
        """Positive `scales [rows, columns]` less their least, rounded to the nearest of 2**bits levels up to a group's largest.

        A scale of zero, as of a group without weights, becomes a very small one. Raises InputError for a bit width outside 1 to
        8, a group size below 1, or scales that are negative, not finite, or too wide for `dtype`.
        """
        check_range("bits", bits, 1, 8)
        check_range("group_size", group_size, 1, 10**9)
        if not bool(torch.isfinite(scales).all()) or bool((scales < 0).any()):
            raise InputError("scales must be finite and not negative; finite weights would be right")
        flat = scales.float().flatten()
        flat = flat.clamp(min=max(_SMALLEST * float(flat.max()), 1e-30))
        offset = flat.min()
        above = flat - offset
        groups = torch.nn.functional.pad(above, (0, -len(above) % group_size)).view(-1, group_size)
        steps = (groups.amax(1) / (2**bits - 1)).to(dtype)
        if not bool(torch.isfinite(steps).all()):
            raise InputError(f"a step of the scales is not finite in {dtype}; a wider dtype, or finite weights, would be right")
        # A group whose scales all equal the least one, or nearly so, has a step of zero and needs no codes.
        wide = steps.float().repeat_interleave(group_size)[: len(flat)]
        codes = torch.where(wide > 0, above / wide.clamp(min=1e-38), 0.0).round().clamp(0, 2**bits - 1).to(torch.uint8)
        return cls(pack(codes[None], bits), steps, offset.reshape(1), scales.shape[0], scales.shape[1], bits, group_size)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        size = self.rows * self.columns
        codes = unpack(self.codes, self.bits_per_code, size)[0].float()
        flat = codes * self.steps.float().repeat_interleave(self.group_size)[:size] + self.offset
        return flat.view(self.rows, self.columns).to(dtype)
