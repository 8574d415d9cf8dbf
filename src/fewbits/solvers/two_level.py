"""Grids whose scales and zero points are themselves on a grid, fitted to runs of neighbouring rows.

Source: SpQR (arXiv 2306.03078), section 4.2: bilevel quantization.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.formats.transposed import Transposed
from fewbits.formats.uniform import Uniform


@dataclass(frozen=True)
class SecondLevel:
    """One vector of values, a number for each row, in runs of `size` rows: what is stored, and what it stands for."""

    codes: Tensor  # uint8 [rows]
    scales: Tensor  # fp16 [runs]
    zeros: Tensor  # fp16 [runs], real
    values: Tensor  # float32 [rows], (code - zero) * scale


def fit_second_level(values: Tensor, bits: int, size: int) -> SecondLevel:
    """`values [rows]` on a min-max grid of `bits` for each run of `size` rows; the last run may be shorter.

    The zero point is real; a run of equal values keeps its value by its zero point alone.
    """
    rows = len(values)
    runs = -(-rows // size)
    # A short last run is filled with its own last value, which moves no end of its range.
    padded = torch.cat([values, values[-1:].expand(runs * size - rows)]).view(runs, size)
    low, high = padded.amin(1), padded.amax(1)
    spread = ((high - low) / (2**bits - 1)).half().float()
    # fp16 must hold -low / scale; a run of nearly equal values has a scale of a thousandth of them.
    least = (low.abs() / 1000).clamp(min=6.2e-5).half().float()
    scales = torch.maximum(spread, least)
    zeros = (-low / scales).half().float()
    codes = torch.round(padded / scales[:, None] + zeros[:, None]).clamp(0, 2**bits - 1)
    decoded = (codes - zeros[:, None]) * scales[:, None]
    return SecondLevel(codes.flatten()[:rows].to(torch.uint8), scales.half(), zeros.half(), decoded.flatten()[:rows])


def as_term(levels: list[SecondLevel], bits: int, size: int) -> Transposed:
    """The term `[rows, vectors]` that stands for the values of one vector after another, all fitted with `bits` and `size`."""
    codes, scales, zeros = (torch.stack([getattr(one, name) for one in levels]) for name in ("codes", "scales", "zeros"))
    return Transposed(Uniform.from_codes(codes, scales, zeros, bits=bits, group_size=min(size, codes.shape[1])))


def fit_range(weight: Tensor, bits: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and real zero point `[rows]` of a min-max grid for each row of `weight [rows, columns]`, zero not forced inside.

    Where `keep` is false a weight does not count: the mean of the row's others stands in for it. Rows of one value get a
    range of 1 on either side.
    """
    if keep is not None:
        count = keep.sum(1, keepdim=True)
        mean = torch.where(keep, weight, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
        weight = torch.where(keep, weight, torch.where(count > 0, mean, 0.0))
    low, high = weight.amin(1), weight.amax(1)
    flat = low == high
    low, high = torch.where(flat, low - 1, low), torch.where(flat, high + 1, high)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
    return scale, -low / scale


def round_with(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """clamp(round(w / s + z), 0, 2**bits - 1) as floats: the real zero point is inside the rounding. Everything broadcasts."""
    safe = torch.where(scale.abs() < 1e-9, torch.full_like(scale, 1e-9), scale)
    return torch.round(weight / safe + zero).clamp(0, 2**bits - 1)
