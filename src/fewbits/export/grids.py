"""A layer as formats of uniform grids hold it: whole codes, 16-bit scales and whole zero points, for rows or groups of columns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbits.core.tensor import CompressedTensor, Term, Transform
from fewbits.formats.permutation import Permutation, Reordering
from fewbits.formats.ranges import fit_groups
from fewbits.formats.ternary import Ternary
from fewbits.formats.uniform import Uniform
from fewbits.layers.linear import StoredLinear

_NARROWEST = 16  # columns that share a scale at least, where groups are cut to divide a row


@dataclass(frozen=True, eq=False)
class Grid:
    """value = (code - zero_point) * scale.

    `codes [rows, columns]` uint8, `scales [rows, groups]` in a 16-bit float, `zero_points [rows, groups]` uint8, all of them
    2**(bits-1) where `symmetric`. With an `order [columns]`, column i of the codes multiplies input order[i].
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    symmetric: bool
    bits: int
    group_size: int
    order: Tensor | None = None

    @property
    def whole_rows(self) -> bool:
        """Whether a row has one scale."""
        return self.group_size >= self.codes.shape[1]

    def column_groups(self) -> Tensor:
        """int64 `[columns]`: the group of every input, in the inputs' own order."""
        columns = self.codes.shape[1]
        groups = torch.arange(columns) // self.group_size
        if self.order is not None:
            groups = torch.empty_like(groups).index_copy_(0, self.order, groups)
        return groups

    def input_codes(self) -> Tensor:
        """The codes in the inputs' own order."""
        return self.codes if self.order is None else torch.empty_like(self.codes).index_copy_(1, self.order, self.codes)

    def unordered(self) -> Grid | None:
        """The same grid in the inputs' own order, where each group still is a run of neighbours; else None."""
        if self.order is None:
            return self
        groups = self.column_groups()
        first = groups[:: self.group_size]
        if not torch.equal(first.repeat_interleave(self.group_size)[: len(groups)], groups):
            return None
        return replace(self, codes=self.input_codes(), scales=self.scales[:, first], zero_points=self.zero_points[:, first], order=None)

    def stored(self) -> CompressedTensor:
        """The compressed tensor that the grid stands for; zero points are left out where it is symmetric."""
        zeros = None if self.symmetric else self.zero_points
        term = Uniform.from_codes(self.codes, self.scales, zeros, bits=self.bits, group_size=self.group_size)
        return CompressedTensor((term,), () if self.order is None else (Permutation.from_order(self.order),))


def read_grid(weight: CompressedTensor) -> Grid | str:
    """The grid that `weight` is, or why it is none, to be put behind a layer's name."""
    if (reason := not_one_term(weight)) is not None:
        return reason
    order = input_order(weight)
    return order if isinstance(order, str) else _read_term(weight.terms[0], order)


def input_order(weight: CompressedTensor) -> Tensor | str | None:
    """int64 `[columns]`: which input each column of the terms multiplies; None: its own. Or what else is done to the inputs."""
    order: Tensor | None = None
    for transform in weight.input_transforms:
        here = _order(transform)
        if here is None:
            return f"a {transform.kind} of its inputs has no place there"
        order = here if order is None else order[here]
    return order


def rounds_inputs(stored: StoredLinear) -> str | None:
    """Why a format whose layers read their inputs as they are cannot hold this one."""
    return None if stored.activation is None else f"its inputs are rounded ({stored.activation.kind}), which the format does not say"


def half_grid(stored: StoredLinear) -> Grid | str:
    """The grid of a layer that reads its inputs as they are, with scales in fp16; or why it is none."""
    if (reason := rounds_inputs(stored)) is not None:
        return reason
    grid = read_grid(stored.weight)
    if isinstance(grid, Grid) and grid.scales.dtype != torch.float16:
        return "its scales are not exact in fp16"
    return grid


def not_one_term(weight: CompressedTensor) -> str | None:
    """Why `weight` is more than one term of its inputs."""
    if len(weight.terms) > 1:
        return f"its weight is a sum of {len(weight.terms)} terms ({' + '.join(term.kind for term in weight.terms)})"
    return transforms_outputs(weight)


def transforms_outputs(weight: CompressedTensor) -> str | None:
    """What is done to the outputs of `weight`'s terms."""
    return f"a {weight.output_transforms[0].kind} of its outputs has no place there" if weight.output_transforms else None


def nearest_grid(stored: StoredLinear, *, bits: int, group_size: int | None, symmetric: bool) -> StoredLinear:
    """A layer's weight on the grid with the least squared error of those that shrink a group's range; inputs are not rounded.

    Where groups do not divide the columns, they are cut to the largest common divisor, or, below 16, whole rows.
    """
    weight = stored.weight.decode()
    columns = weight.shape[1]
    size = columns if group_size is None else math.gcd(columns, group_size)
    size = columns if size < _NARROWEST else size
    scales, zeros = fit_groups(weight, bits, size, symmetric=symmetric, search="mse")
    term = Uniform.nearest(weight, scales, zeros, bits=bits, group_size=size, symmetric=symmetric)
    return StoredLinear(CompressedTensor((term,)), None, stored.offset)


def in_16_bits(values: Tensor) -> Tensor | None:
    """`values` in fp16, else in bfloat16, where one holds all of them exactly; a 16-bit dtype is kept."""
    if values.element_size() == 2:
        return values
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(values.to(dtype).to(values.dtype), values):
            return values.to(dtype)
    return None


def _order(transform: Transform) -> Tensor | None:
    """int64: the old place of every feature, where `transform` is nothing but another order."""
    if isinstance(transform, Permutation):
        return transform.order.long()
    return transform.order() if isinstance(transform, Reordering) else None


def _read_term(term: Term, order: Tensor | None) -> Grid | str:
    if isinstance(term, Ternary):
        stored = torch.ones(1, 1, dtype=torch.float16) if term.scales is None else term.scales
        codes, zeros, bits = (term.unpacked_signs() + 2).to(torch.uint8), None, 2
    elif isinstance(term, Uniform):
        stored = term.scales
        codes, zeros, bits = term.unpacked_codes(), _zero_points(term), term.bits_per_code
        if zeros is None and term.zero_points is not None:
            return "its zero points are no whole numbers among the codes"
    else:
        return f"its term is of kind {term.kind}, not a uniform grid"
    scales = in_16_bits(stored.decode() if isinstance(stored, Term) else stored)
    if scales is None:
        return "its scales are not exact in 16 bits"
    rows, columns = term.shape
    groups = -(-columns // term.group_size)
    wide = torch.full((1, 1), 2 ** (bits - 1), dtype=torch.uint8) if zeros is None else zeros
    scales, wide = (values.expand(rows, groups).contiguous() for values in (scales, wide))
    return Grid(codes, scales, wide, zeros is None, bits, min(term.group_size, columns), order)


def _zero_points(term: Uniform) -> Tensor | None:
    """uint8, the shape of the scales; None where there are none or one is no code."""
    if term.zero_points is None:
        return None
    zeros = term.unpacked_zero_points()
    whole = zeros.round().clamp(0, 2**term.bits_per_code - 1)
    return whole.to(torch.uint8) if torch.equal(whole, zeros) else None
