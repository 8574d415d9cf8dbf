"""Layers as uniform grids: what is one, why others are not, and the nearest."""

import pytest
import torch

from fewbits.core.tensor import CompressedTensor
from fewbits.export.grids import Grid, in_16_bits, nearest_grid, read_grid
from fewbits.formats.dense import Dense
from fewbits.formats.diagonal import DiagonalScale
from fewbits.formats.flat_scales import FlatScales
from fewbits.formats.lowrank import LowRank
from fewbits.formats.permutation import PackedPermutation, Permutation
from fewbits.formats.ternary import Ternary
from fewbits.formats.uniform import Uniform
from fewbits.layers.linear import StoredLinear


def term(zeros=None, scales=None, bits=3, group_size=4, rows=2, columns=8):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (rows, columns), generator=generator).to(torch.uint8)
    scales = torch.rand(rows, columns // group_size, generator=generator).half() if scales is None else scales
    return Uniform.from_codes(codes, scales, zeros, bits=bits, group_size=group_size)


def test_a_uniform_term_is_a_grid_of_its_own_numbers():
    zeros = torch.tensor([[0, 7], [3, 4]], dtype=torch.uint8)
    grid = read_grid(CompressedTensor((term(zeros),)))
    assert torch.equal(grid.zero_points, zeros) and not grid.symmetric and not grid.whole_rows
    assert torch.equal(grid.stored().decode(), term(zeros).decode())


def test_whole_real_zero_points_and_scales_of_two_levels_are_held_where_exact():
    whole = term(torch.tensor([[0.0, 7], [3, 4]]).half())
    assert torch.equal(read_grid(CompressedTensor((whole,))).stored().decode(), whole.decode())
    steps = Uniform.from_codes(torch.tensor([[1], [2]], dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1), bits=2)
    assert read_grid(CompressedTensor((term(scales=steps, group_size=8),))).scales.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (CompressedTensor((term(), Dense(torch.ones(2, 8)))), "its weight is a sum of 2 terms (uniform + dense)"),
        (CompressedTensor((Dense(torch.ones(2, 8)),)), "its term is of kind dense, not a uniform grid"),
        (
            CompressedTensor((LowRank(Dense(torch.ones(2, 1)), Dense(torch.ones(1, 8))),)),
            "its term is of kind low_rank, not a uniform grid",
        ),
        (CompressedTensor((term(),), (DiagonalScale(torch.ones(8)),)), "a diagonal_scale of its inputs has no place there"),
        (CompressedTensor((term(),), (), (DiagonalScale(torch.ones(2)),)), "a diagonal_scale of its outputs has no place there"),
        (CompressedTensor((term(torch.full((2, 2), 1.5)),)), "its zero points are no whole numbers among the codes"),
        (CompressedTensor((term(torch.full((2, 2), 8.0)),)), "its zero points are no whole numbers among the codes"),
        (CompressedTensor((term(scales=torch.full((2, 2), 1 / 3)),)), "its scales are not exact in 16 bits"),
        (
            CompressedTensor((term(scales=FlatScales.nearest(torch.rand(2, 2) + 0.1, bits=8, group_size=4)),)),
            "its scales are not exact in 16 bits",
        ),
    ],
)
def test_what_is_no_grid_says_why(weight, reason):
    assert read_grid(weight) == reason


def test_ternary_codes_are_a_grid_of_two_bits():
    signs = torch.tensor([[-1, 0, 1, 1, 0, -1, 1]])
    grid = read_grid(CompressedTensor((Ternary.from_signs(signs, torch.tensor([[0.5]]).half()),)))
    assert grid.bits == 2 and grid.symmetric
    assert torch.equal(grid.stored().decode(), signs * 0.5)
    assert torch.equal(read_grid(CompressedTensor((Ternary.from_signs(signs),))).stored().decode(), signs.float())


def test_orders_follow_one_another_and_codes_lie_at_their_inputs():
    first, second = torch.tensor([3, 1, 7, 0, 2, 6, 4, 5]), torch.tensor([6, 0, 5, 2, 7, 1, 3, 4])
    weight = CompressedTensor((term(),), (Permutation.from_order(first), PackedPermutation.from_order(second)))
    grid = read_grid(weight)
    scales = grid.scales.float()[:, grid.column_groups()]
    assert torch.equal((grid.input_codes().float() - 4) * scales, weight.decode())
    assert torch.equal(grid.stored().decode(), weight.decode())


def test_an_order_is_dropped_only_where_groups_stay_together():
    inside = torch.tensor([6, 5, 4, 7, 3, 1, 0, 2])  # the groups change places, and so do the columns in each
    weight = CompressedTensor((term(),), (Permutation.from_order(inside),))
    plain = read_grid(weight).unordered()
    assert plain.order is None and torch.equal(plain.stored().decode(), weight.decode())
    scattered = CompressedTensor((term(),), (Permutation.from_order(torch.tensor([6, 5, 0, 7, 3, 1, 4, 2])),))
    assert read_grid(scattered).unordered() is None


def test_one_scale_for_all_rows_is_written_for_each():
    grid = read_grid(CompressedTensor((term(scales=torch.tensor([[0.5, 0.25]]).half()),)))
    assert grid.scales.tolist() == [[0.5, 0.25]] * 2 and grid.zero_points.tolist() == [[4, 4]] * 2


def test_16_bits_are_used_where_they_are_exact():
    assert in_16_bits(torch.tensor([0.5, 3.0])).dtype == torch.float16
    assert in_16_bits(torch.tensor([2.0**100])).dtype == torch.bfloat16
    assert in_16_bits(torch.tensor([1 / 3])) is None
    assert in_16_bits(torch.tensor([1 / 3]).bfloat16()).dtype == torch.bfloat16


def test_the_nearest_grid_loses_less_than_min_max_and_cuts_groups_that_do_not_divide():
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(0)) ** 3
    stored = StoredLinear(CompressedTensor((Dense(weight),)))
    near = nearest_grid(stored, bits=4, group_size=64, symmetric=True)
    grid = read_grid(near.weight)
    assert isinstance(grid, Grid) and grid.group_size == 32
    scales = weight.unflatten(1, (-1, 32)).abs().amax(-1) / 7.5
    plain = Uniform.nearest(weight, scales, torch.full_like(scales, 8), bits=4, group_size=32, symmetric=True).decode()
    assert (near.weight.decode() - weight).square().sum() < (plain - weight).square().sum()
    assert read_grid(nearest_grid(stored, bits=4, group_size=25, symmetric=True).weight).whole_rows
