"""Where the levels of a uniform grid lie: scales and zero points fitted to rows or groups of weights."""

from typing import Literal, get_args

import torch
from torch import Tensor

from fewbits.core.errors import InputError

_SHRINK_STEPS = 80  # GPTQ's clip search: factors 1 - i/100, i = 0..79


_POWERS = {"shrink": 2.4, "mse": 2.0}
Search = Literal["minmax", "percentile", "mse", "shrink"]
SEARCHES = get_args(Search)


def fit_uniform(
    weight: Tensor, bits: int, *, symmetric: bool = False, search: str = "minmax", power: float | None = None, percentile: float = 0.999
) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point, each `[rows, 1]`, for `weight [rows, columns]`.

    The range always includes zero; a row of zeros gets [-1, 1]. "minmax" spans the extremes; "percentile" leaves
    1 - percentile of the entries out at either end; "mse" and "shrink" keep the shrink factor of the range with the least sum of
    |rounded - weight|**power for each row, power 2 and 2.4 (GPTQ's official quantizer) unless given.
    Raises InputError for an unknown search or a percentile outside (0.5, 1].
    """
    if search not in SEARCHES:
        raise InputError(f"search={search!r} is not known; {', '.join(map(repr, SEARCHES))} are")
    low, high = _extremes(weight, search, percentile)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high  # the official code leaves low at 0 in a row without negative weights, which cuts its range in half
    flat = (low == 0) & (high == 0)
    low, high = torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)
    best = _grid(low, high, bits, symmetric)
    if search in _POWERS:
        power = _POWERS[search] if power is None else power
        least = _distance(weight, *best, bits, power)
        for step in range(1, _SHRINK_STEPS):
            factor = 1 - step / 100
            trial = _grid(factor * low, factor * high, bits, symmetric)
            distance = _distance(weight, *trial, bits, power)
            better = distance < least
            best = (torch.where(better, trial[0], best[0]), torch.where(better, trial[1], best[1]))
            least = torch.minimum(distance, least)
    return best


def _extremes(weight: Tensor, search: str, percentile: float) -> tuple[Tensor, Tensor]:
    """Both ends of each row's range, `[rows, 1]`, zero included."""
    if search != "percentile":
        return weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    if not 0.5 < percentile <= 1:
        raise InputError(f"percentile={percentile} is out of range; above 0.5 and up to 1, such as 0.999, would be right")
    ends = torch.tensor([1 - percentile, percentile], dtype=weight.dtype, device=weight.device)
    low, high = torch.quantile(weight, ends, dim=1, keepdim=True)
    return low.clamp(max=0), high.clamp(min=0)


def fit_groups(weight: Tensor, bits: int, group_size: int, **options) -> tuple[Tensor, Tensor]:
    """`fit_uniform` for every group of columns: scales and zero points `[rows, groups]`; the last group may be shorter."""
    fitted = [fit_uniform(group, bits, **options) for group in weight.split(group_size, dim=1)]
    return torch.cat([scale for scale, _ in fitted], dim=1), torch.cat([zero for _, zero in fitted], dim=1)


def fit_extremes(matrix: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Scales and real zero points `[rows, groups]`, both fp16, that put the first and last level on each group's extremes.

    Zero need not lie inside; a group of nearly equal values has a scale of a thousandth of them, so that fp16 holds its zero.
    """
    whole = matrix.shape[1] // group_size * group_size
    parts = [matrix[:, :whole].unflatten(1, (-1, group_size)), matrix[:, None, whole:]]  # the last group may be shorter
    ends = [torch.aminmax(part, dim=2) for part in parts if part.numel()]
    low, high = torch.cat([one.min for one in ends], 1), torch.cat([one.max for one in ends], 1)
    spread = (high - low) / (2**bits - 1)
    scales = torch.maximum(spread, (low.abs() / 1000).clamp(min=6.2e-5)).half()
    return scales, (-low / scales.float()).half()


def round_codes(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """clamp(round(w / s) + z, 0, 2**bits - 1), as floats; everything broadcasts."""
    return torch.clamp(torch.round(weight / scale) + zero_point, 0, 2**bits - 1)


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    scale = (high - low) / (2**bits - 1)
    zero_point = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale)
    return scale, zero_point


def _distance(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, power: float) -> Tensor:
    rounded = (round_codes(weight, scale, zero_point, bits) - zero_point) * scale
    return (rounded - weight).abs().pow(power).sum(1, keepdim=True)
