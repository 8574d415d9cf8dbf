"""Steps and minimums of block grids: fitted to weights by weighted least squares, then rounded to what a block can store.

The search follows llama.cpp's k-quants: several ranges are tried, for the codes of each the best step and minimum are linear least
squares. Beyond it, the few-bit numbers are chosen together with their neighbours, codes rounded anew for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fewbits.core.tensor import Term
from fewbits.formats.block_grid import BlockGrid

_RANGES = tuple(step / 10 for step in range(-10, 16))  # how many codes more or less than there are the range of a group is cut into
_ROUNDS = 16  # of moves by one, which nearly always stop sooner
_LARGEST = 65504.0  # fp16


@dataclass(frozen=True, eq=False)
class Units:
    """What one of a few-bit scale or minimum is worth, float32 `[rows, 1]`, fp16 numbers; None where these are fp16 themselves."""

    scales: Tensor | None = None
    minimums: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Levels:
    """Of groups `[rows, groups]`: value = code * step + minimum, float32; and the same numbers as a block stores them."""

    steps: Tensor
    minimums: Tensor
    stored: dict[str, Tensor]

    def codes(self, weight: Tensor, bits: int) -> Tensor:
        """The nearest codes of `weight [rows, groups, size]`, as floats."""
        return _round(weight, self.steps[..., None], self.minimums[..., None], bits)


def grouped(values: Tensor, size: int) -> Tensor:
    """`[..., columns]` to `[..., groups, size]`; a short last group is filled with its last value."""
    missing = -values.shape[-1] % size
    if missing:
        values = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], missing)], dim=-1)
    return values.unflatten(-1, (-1, size))


def fit_real(weight: Tensor, importance: Tensor, grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """Real steps and minimums `[rows, groups]` of the least error found, for `weight [rows, groups, size]`.

    Errors are counted by `importance [groups, size]`.
    """
    counted = importance.float() + 1e-6 * importance.float().mean().clamp(min=1e-30)
    best: tuple[Tensor, ...] = ()
    for codes in _trial_codes(weight, grid):
        step, minimum = _least_squares(weight, counted, codes, grid)
        loss = _loss(weight, counted, step, minimum, grid.bits)
        best = _better(best, (loss, step, minimum))
    return best[1], best[2]


def to_units(fitted: tuple[Tensor, Tensor], grid: BlockGrid) -> Units:
    """Of one span, from the real steps and minimums `[rows, groups]` that `fit_real` found for its groups."""
    if grid.scale_bits is None:
        return Units()
    steps, minimums = fitted
    if grid.minimums:
        most = 2**grid.scale_bits - 1
        return Units(_half(steps.amax(1, keepdim=True) / most), _half(-minimums.amin(1, keepdim=True) / most))
    largest = steps.gather(1, steps.abs().argmax(1, keepdim=True))
    return Units(_half(-largest / 2 ** (grid.scale_bits - 1)))


def to_levels(fitted: tuple[Tensor, Tensor], weight: Tensor, importance: Tensor, grid: BlockGrid, units: Units) -> Levels:
    """Real steps and minimums as they are stored, of groups `weight [rows, groups, size]` in one span with `units`."""
    steps, minimums = fitted
    if units.scales is None:
        stored = {"scales": _half(steps).half()} | ({"minimums": _half(minimums).half()} if grid.minimums else {})
        steps = stored["scales"].float()
        return Levels(steps, stored["minimums"].float() if grid.minimums else _lowest(steps, grid), stored)
    assert grid.scale_bits is not None
    scales = _ratio(steps, units.scales) + _zero(grid)
    lows = torch.zeros_like(scales) if units.minimums is None else _ratio(-minimums, units.minimums)
    best = _best_near(weight, importance, grid, units, (scales, lows))
    for _ in range(_ROUNDS):
        closer = _best_near(weight, importance, grid, units, (best.scales, best.lows))
        if not bool((closer.losses < best.losses).any()):
            break
        best = closer
    stored = {"scales": best.scales.to(torch.uint8)} | ({"minimums": best.lows.to(torch.uint8)} if grid.minimums else {})
    return Levels(best.steps, best.minimums, stored)


class _Choice(NamedTuple):
    """Of every group `[rows, groups]`: its weighted error, the few-bit numbers, and what they stand for."""

    losses: Tensor
    scales: Tensor
    lows: Tensor
    steps: Tensor
    minimums: Tensor


def _best_near(weight: Tensor, importance: Tensor, grid: BlockGrid, units: Units, start: tuple[Tensor, Tensor]) -> _Choice:
    """The best of few-bit scales and minimums, of which one or both may be one up or down from `start`."""
    assert grid.scale_bits is not None and units.scales is not None
    most = 2**grid.scale_bits - 1
    best: tuple[Tensor, ...] = ()
    for near, other in itertools.product((0, -1, 1), (0, -1, 1) if grid.minimums else (0,)):
        scales, lows = (start[0] + near).clamp(0, most), (start[1] + other).clamp(0, most)
        steps = (scales - _zero(grid)) * units.scales
        minimums = _lowest(steps, grid) if units.minimums is None else -lows * units.minimums
        best = _better(best, (_loss(weight, importance, steps, minimums, grid.bits), scales, lows, steps, minimums))
    return _Choice(*best)


def unit_fields(units: Units) -> dict[str, Tensor]:
    """What a block stores of them, fp16 `[rows, 1]`."""
    both = {"super_scales": units.scales, "super_minimums": units.minimums}
    return {name: one.half() for name, one in both.items() if one is not None}


def round_to_blocks(weight: Tensor, grid: BlockGrid, importance: Tensor | None = None) -> Term:
    """`weight [rows, columns]` rounded to the nearest levels of a grid fitted to it, errors counted by `importance [columns]`."""
    counted = weight.new_ones(weight.shape[1]) if importance is None else importance
    parts = [_round_span(*span, grid) for span in _spans(weight, counted, grid)]
    return grid.term({name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]})


def _spans(weight: Tensor, importance: Tensor, grid: BlockGrid) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(weight.split(grid.span, dim=1), importance.split(grid.span), strict=True)


def _round_span(weight: Tensor, importance: Tensor, grid: BlockGrid) -> dict[str, Tensor]:
    parts, counted = grouped(weight, grid.group_size), grouped(importance, grid.group_size)
    fitted = fit_real(parts, counted, grid)
    units = to_units(fitted, grid)
    levels = to_levels(fitted, parts, counted, grid, units)
    codes = levels.codes(parts, grid.bits).flatten(1)[:, : weight.shape[1]].to(torch.uint8)
    return {"codes": codes, **levels.stored, **unit_fields(units)}


def _trial_codes(weight: Tensor, grid: BlockGrid) -> Iterator[Tensor]:
    most = 2**grid.bits - 1
    if grid.minimums:
        low = weight.amin(-1, keepdim=True)
        low = low.clamp(max=0) if grid.scale_bits else low
        spread = (weight.amax(-1, keepdim=True) - low).clamp(min=1e-30)
        for more in _RANGES:
            yield ((weight - low) * ((most + more) / spread)).round().clamp(0, most)
        return
    half = 2 ** (grid.bits - 1)
    largest = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))
    largest = torch.where(largest == 0, 1e-30, largest)
    for more in _RANGES:
        for sign in (-1, 1):
            yield (weight * (sign * (half + more) / largest) + half).round().clamp(0, most)


def _least_squares(weight: Tensor, importance: Tensor, codes: Tensor, grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """The best step and minimum `[rows, groups]` for given codes; minimums of few bits are not above zero."""
    if not grid.minimums:
        offset = codes - 2 ** (grid.bits - 1)
        step = (importance * offset * weight).sum(-1) / (importance * offset.square()).sum(-1).clamp(min=1e-30)
        return step, _lowest(step, grid)
    total = importance.sum(-1)
    code, value = (importance * codes).sum(-1), (importance * weight).sum(-1)
    square, product = (importance * codes.square()).sum(-1), (importance * codes * weight).sum(-1)
    determinant = total * square - code.square()
    singular = determinant <= 1e-6 * total * square
    step = torch.where(singular, 0.0, (total * product - code * value) / torch.where(singular, 1.0, determinant)).clamp(min=0)
    minimum = (value - step * code) / total
    if grid.scale_bits is None:
        return step, minimum
    through_zero = (product / square.clamp(min=1e-30)).clamp(min=0)
    return torch.where(minimum > 0, through_zero, step), minimum.clamp(max=0)


def _loss(weight: Tensor, importance: Tensor, steps: Tensor, minimums: Tensor, bits: int) -> Tensor:
    step, minimum = steps[..., None], minimums[..., None]
    return (importance * (_round(weight, step, minimum, bits) * step + minimum - weight).square()).sum(-1)


def _round(weight: Tensor, step: Tensor, minimum: Tensor, bits: int) -> Tensor:
    return ((weight - minimum) / torch.where(step == 0, torch.inf, step)).round().clamp(0, 2**bits - 1)


def _better(best: tuple[Tensor, ...], trial: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of each group the trial where its loss, the first of the tensors, is less."""
    if not best:
        return trial
    less = trial[0] < best[0]
    return tuple(torch.where(less, new, old) for new, old in zip(trial, best, strict=True))


def _zero(grid: BlockGrid) -> int:
    """The few-bit scale that stands for zero."""
    return 0 if grid.minimums or grid.scale_bits is None else 2 ** (grid.scale_bits - 1)


def _lowest(steps: Tensor, grid: BlockGrid) -> Tensor:
    return -(2 ** (grid.bits - 1)) * steps


def _ratio(values: Tensor, unit: Tensor) -> Tensor:
    return torch.round(values / torch.where(unit == 0, torch.inf, unit))


def _half(values: Tensor) -> Tensor:
    """The nearest fp16 numbers, in float32."""
    return values.clamp(-_LARGEST, _LARGEST).half().float()
