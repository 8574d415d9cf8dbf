"""Grids whose scales and zero points are themselves in few bits: the fit of both levels, and which weights spoil it.

Level 1: value = (code - zero) * scale for each row of a column group, the zero point real. Level 2: the scales (and zeros) of
one column group, one a row, are cut into runs of consecutive rows, each run with a min-max grid of its own.
Source: SpQR, arXiv 2306.03078, section 4 and appendix; all functions are pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbits.formats.transposed import Transposed
from fewbits.formats.uniform import Uniform

_SMALLEST = 1e-9  # a divisor; a scale may well decode to zero


def fit_range(group: Tensor, bits: int, left_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Min-max scale and real zero point, float32 `[rows, 1]`, for `group [rows, columns]` without the entries `left_out` (bool).

    The range need not hold zero, but lies no further from it than it is wide: the zero point is within -top and 2 top,
    top = 2**bits - 1. So one row of nearly equal weights cannot spoil the zero points of its whole run. A group of one value
    is exact; a group of zeros, or without an entry, gets scale 0.
    """
    top = 2**bits - 1
    if left_out is None:
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
    else:
        low = group.masked_fill(left_out, torch.inf).amin(1, keepdim=True)
        high = group.masked_fill(left_out, -torch.inf).amax(1, keepdim=True)
        empty = left_out.all(1, keepdim=True)
        low, high = low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)
    low, high = torch.minimum(low, high / 2), torch.maximum(high, low / 2)
    scale = (high - low) / top
    return scale, torch.where(scale > 0, -low / scale, top / 2)


def inner_codes(weight: Tensor, scale: Tensor, zero: Tensor, top: Tensor | int) -> Tensor:
    """clamp(round(w / s + z), 0, top) as floats; the real zero point is inside the rounding. Everything broadcasts."""
    codes = torch.round(weight / scale.clamp(min=_SMALLEST) + zero).clamp_(min=0)
    return torch.minimum(codes, torch.as_tensor(top, dtype=codes.dtype, device=codes.device))


def leave_one_out_gains(group: Tensor, precision: Tensor, bits: int) -> Tensor:
    """By how much a row's squared error falls, `[rows, columns]`, where one weight of `group [rows, columns]` leaves its grid.

    The error is sum(((rounded - w) * precision)**2); `precision [columns]` is 1 / U_jj. It is the error with a grid fitted on
    all weights, less the error of the others with a grid fitted on them (SpQR, section 4.2). Only where the weight is one end
    of the range does the grid change; elsewhere the gain is the weight's own error.
    """
    errors = _squares(group, precision, bits, None)
    gains = errors.clone()
    for end in (group.argmin(1, keepdim=True), group.argmax(1, keepdim=True)):
        alone = torch.zeros_like(group, dtype=torch.bool).scatter_(1, end, True)
        others = _squares(group, precision, bits, alone).masked_fill(alone, 0.0)
        gains.scatter_(1, end, errors.sum(1, keepdim=True) - others.sum(1, keepdim=True))
    return gains


def _squares(group: Tensor, precision: Tensor, bits: int, left_out: Tensor | None) -> Tensor:
    scale, zero = fit_range(group, bits, left_out)
    rounded = (inner_codes(group, scale, zero, 2**bits - 1) - zero) * scale
    return ((rounded - group) * precision).square()


@dataclass(frozen=True)
class Lines:
    """One value a row for each of some column groups, as stored; made by `quantize_lines`."""

    values: Tensor  # float32 [groups, rows]: exactly what the stored form decodes to
    codes: Tensor | None  # uint8 [groups, rows]; None: the values are stored in fp16
    scales: Tensor | None  # fp16 [groups, runs]
    zeros: Tensor | None  # fp16 [groups, runs]


def quantize_lines(values: Tensor, bits: int | None, run: int) -> Lines:
    """`values [groups, rows]` in runs of `run` consecutive rows, the last of which may be shorter, at `bits` each; None: fp16.

    A run's grid is min-max with an fp16 scale and an fp16 real zero point. Where one value for the whole run loses less, as in
    runs of equal values, whose min-max grid is empty or beyond fp16, the run is stored as that value.
    """
    if bits is None:
        return Lines(values.half().float(), None, None, None)
    groups, rows = values.shape
    top, runs = 2**bits - 1, -(-rows // run)
    filled = pad(values[:, None], (0, runs * run - rows), mode="replicate")[:, 0]  # more of the last row: its run's range stays
    cut = filled.float().view(groups, runs, run)
    low, high = cut.amin(2, keepdim=True), cut.amax(2, keepdim=True)
    scales = ((high - low) / top).half()
    zeros = (-low / scales.float()).half()
    codes = torch.round(cut / scales.float() + zeros.float()).clamp(0, top)
    middle = ((low + high) / 2).half()
    loss = ((codes - zeros.float()) * scales.float() - cut).square().sum(2, keepdim=True)
    flat = ~(loss <= (middle.float() - cut).square().sum(2, keepdim=True))  # an overflowed grid's loss is not a number
    codes = codes.masked_fill(flat, 0.0)
    scales, zeros = torch.where(flat, middle, scales), zeros.masked_fill(flat, -1.0)  # (0 - -1) * middle
    decoded = (codes - zeros.float()) * scales.float()
    whole = (part.reshape(groups, -1)[:, :rows] for part in (decoded, codes.to(torch.uint8)))
    return Lines(*whole, scales[:, :, 0], zeros[:, :, 0])


def store_lines(lines: Sequence[Lines], bits: int | None, run: int) -> Tensor | Transposed:
    """Lines one below the other as what a `Uniform` takes for scales or zero points: `[rows, groups]`."""
    if bits is None:
        return torch.cat([line.values for line in lines]).half().T.contiguous()
    codes, scales, zeros = (torch.cat([getattr(line, name) for line in lines]) for name in ("codes", "scales", "zeros"))
    return Transposed(Uniform.from_codes(codes, scales, zeros, bits=bits, group_size=run))
