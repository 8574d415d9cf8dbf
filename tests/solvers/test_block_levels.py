"""Levels of block grids: stored numbers are what codes were rounded with, and none nearby are better."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.formats.block_grid import GRIDS, get_grid
from fewbits.solvers.block_levels import fit_real, grouped, round_to_blocks, to_levels, to_units, unit_fields


def drawn(rows, columns, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) / torch.rand(rows, columns, generator=generator).clamp(min=0.1) + shift


@pytest.mark.parametrize("name", list(GRIDS))
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 3), columns=st.integers(1, 300), seed=st.integers(0, 99), shift=st.sampled_from([0.0, 5.0, -5.0]))
def test_codes_are_the_nearest_of_the_stored_levels(name, rows, columns, seed, shift):
    grid, weight = GRIDS[name], drawn(rows, columns, seed, shift)
    term = round_to_blocks(weight, grid)
    assert term.shape == (rows, columns)
    codes, decoded = term.unpacked_codes().int(), term.decode()
    steps = term.steps if grid.minimums else term.scales
    wide = (steps.decode() if grid.scale_bits else steps.float()).repeat_interleave(grid.group_size, dim=1)[:, :columns]
    inside = (codes > 0) & (codes < 2**grid.bits - 1)
    assert bool(((decoded - weight).abs()[inside] <= 0.5001 * wide.abs()[inside] + 1e-6).all())


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q6_k"])
def test_no_neighbouring_scale_is_better(name):
    """Every stored scale and minimum one up or down, codes rounded anew: the weighted error does not fall."""
    grid = GRIDS[name]
    weight = grouped(drawn(8, grid.span), grid.group_size)
    importance = torch.rand(grid.groups, grid.group_size, generator=torch.Generator().manual_seed(1))
    fitted = fit_real(weight, importance, grid)
    units = to_units(fitted, grid)
    levels = to_levels(fitted, weight, importance, grid, units)
    most = 2**grid.scale_bits - 1

    def loss(stored):
        fields = stored | unit_fields(units) | {"codes": torch.zeros(8, grid.span, dtype=torch.uint8)}
        minimum = grid.term(fields).decode().unflatten(1, (-1, grid.group_size))
        step = grid.term(fields | {"codes": fields["codes"] + 1}).decode().unflatten(1, (-1, grid.group_size)) - minimum
        codes = ((weight - minimum) / torch.where(step == 0, torch.inf, step)).round().clamp(0, 2**grid.bits - 1)
        return (importance * (codes * step + minimum - weight).square()).sum(-1)

    least = loss(levels.stored)
    moves = itertools.product((-1, 0, 1), repeat=len(levels.stored))
    for move in moves:
        other = {one: (v.int() + m).clamp(0, most).to(torch.uint8) for (one, v), m in zip(levels.stored.items(), move, strict=True)}
        assert bool((loss(other) >= least * (1 - 1e-4)).all()), move


def test_importance_decides_which_weights_are_met():
    weight = drawn(16, 256)
    importance = torch.where(torch.arange(256) % 4 == 0, 100.0, 1.0)
    for name in ("q2_k", "q3_k", "q4_k", "q4_0"):
        even, told = (round_to_blocks(weight, GRIDS[name], one).decode() for one in (None, importance))
        lost = [((weight - one).square() * importance).sum() for one in (even, told)]
        assert lost[1] < 0.8 * lost[0] and (weight - told).square().sum() > (weight - even).square().sum()


def test_what_lies_on_a_grid_is_kept():
    """-8 to 7 halves, the largest among them in each group: symmetric levels are these numbers, to a step of fp16."""
    weight = (torch.arange(256) % 16 - 8).float()[None] / 2
    assert torch.equal(round_to_blocks(weight, GRIDS["q4_0"]).decode(), weight)
    torch.testing.assert_close(round_to_blocks(weight, GRIDS["q4_1"]).decode(), weight, rtol=1e-3, atol=1e-3)
    assert torch.equal(round_to_blocks(torch.zeros(2, 256), GRIDS["q4_k"]).decode(), torch.zeros(2, 256))


def test_more_bits_lose_less():
    weight = drawn(16, 512)
    lost = [
        float((weight - round_to_blocks(weight, GRIDS[name]).decode()).square().sum()) for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
    ]
    assert lost == sorted(lost, reverse=True)


def test_an_unknown_grid_is_named():
    with pytest.raises(InputError, match="no grid is called 'q4_2'; did you mean 'q4_"):
        get_grid("q4_2")
