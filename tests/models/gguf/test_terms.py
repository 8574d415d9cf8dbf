"""Which terms a block type holds exactly, what is said of the others, and blocks made terms again."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.block_grid import GRIDS
from fewbits.formats.dense import Dense
from fewbits.formats.lowrank import LowRank
from fewbits.formats.permutation import Permutation
from fewbits.formats.stepped import Stepped
from fewbits.formats.uniform import Uniform
from fewbits.layers.linear import StoredLinear
from fewbits.models.gguf.blocks import TYPES
from fewbits.models.gguf.terms import held, plain, read_term
from fewbits.solvers.block_levels import round_to_blocks

BY_NUMBER = {kind.number: kind for kind in TYPES.values()}


def layer(*terms, **more):
    return StoredLinear(CompressedTensor(terms, **more))


def uniform(bits, group, columns=128, rows=3, zeros=None, scale_rows=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    scales = torch.rand(scale_rows or rows, groups, generator=generator).half()
    if zeros == "integer":
        zeros = torch.randint(2**bits, scales.shape, generator=generator, dtype=torch.uint8)
    elif zeros is not None:
        zeros = torch.full(scales.shape, zeros).half()
    codes = torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    return Uniform.from_codes(codes, scales, zeros, bits=bits, group_size=group)


@pytest.mark.parametrize(("bits", "name"), [(4, "q4_0"), (5, "q5_0"), (8, "q8_0")])
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 4), blocks=st.integers(1, 5), group=st.integers(1, 4), shared=st.booleans(), seed=st.integers(0, 99))
def test_symmetric_groups_keep_their_codes(bits, name, rows, blocks, group, shared, seed):
    term = uniform(bits, 32 * group, 32 * blocks, rows, scale_rows=1 if shared else None, seed=seed)
    blocks = held(layer(term))
    assert blocks.type_number == TYPES[name].number and blocks.shape == term.shape
    again = read_term(TYPES[name], blocks.data)
    assert torch.equal(again.unpacked_codes(), term.unpacked_codes()) and torch.equal(again.decode(), term.decode())


@pytest.mark.parametrize("name", list(GRIDS))
@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 3), blocks=st.integers(1, 2), seed=st.integers(0, 99))
def test_every_grid_goes_out_and_comes_back(name, rows, blocks, seed):
    weight = torch.randn(rows, blocks * GRIDS[name].span, generator=torch.Generator().manual_seed(seed))
    term = round_to_blocks(weight, GRIDS[name])
    blocks = held(layer(term))
    assert blocks.type_number == TYPES[name].number
    again = read_term(TYPES[name], blocks.data)
    assert again.settings() == term.settings()
    assert all(torch.equal(tensor, term.tensors()[part]) for part, tensor in again.tensors().items())
    assert 8 * blocks.data.numel() == sum(term.bits().values())


def test_zero_points_are_held_where_their_product_is_a_number_of_fp16():
    half = held(layer(uniform(4, 64, zeros=8.0)))
    assert half.type_number == TYPES["q4_1"].number
    assert torch.equal(read_term(TYPES["q4_1"], half.data).decode(), uniform(4, 64, zeros=8.0).decode())
    assert held(layer(uniform(5, 64, zeros=0.5))).type_number == TYPES["q5_1"].number
    assert "zero points times scales are not fp16 numbers, as q4_1's minimums must be" in held(layer(uniform(4, 64, zeros="integer")))
    assert "zero points times scales" in held(layer(uniform(4, 64, zeros=7.3)))


def two_level(columns=256, group=16, sub_group=16, dtype=torch.float16):
    scales = uniform(6, sub_group, columns // group)
    return replace(uniform(3, group, columns), scales=replace(scales, scales=scales.scales.to(dtype)))


REFUSED = {
    "3-bit codes with a symmetric grid and fp16 scales; 4 or 5 bits": layer(uniform(3, 32)),
    "8-bit codes with zero points": layer(uniform(8, 32, zeros=0.0)),
    "128 columns in groups of 24 do not fill blocks of 32": layer(uniform(4, 24)),
    "120 columns in groups of 120 do not fill blocks of 32": layer(uniform(4, 120, 120)),
    "scales in float32 are not fp16 numbers": layer(replace(uniform(4, 32), scales=torch.rand(3, 4))),
    "no block type holds a term of kind low_rank": layer(LowRank(Dense(torch.rand(3, 2)), Dense(torch.rand(2, 128)))),
    "no block type holds a term of kind dense": layer(Dense(torch.zeros(3, 128))),
    "a sum of uniform and dense": layer(uniform(4, 32), Dense(torch.zeros(3, 128))),
    "permutation transforms its inputs": layer(uniform(4, 32), input_transforms=(Permutation.from_order(torch.randperm(128)),)),
    "permutation transforms its outputs": layer(uniform(4, 32), output_transforms=(Permutation.from_order(torch.randperm(3)),)),
    "its inputs are rounded by dense": StoredLinear(CompressedTensor((uniform(4, 32),)), activation=Dense(torch.zeros(1, 1))),
    "groups of 32 of 256 columns are those of no block type": layer(two_level(group=32, sub_group=8)),
    "groups of 16 of 128 columns are those of no block type": layer(two_level(128)),
    "two-level scales of uniform codes of 3 bits": layer(two_level(dtype=torch.float32)),
    "6-bit codes with minimums": layer(Stepped.from_codes(torch.zeros(1, 32), torch.ones(1, 1).half(), None, bits=6, group_size=32)),
}


@pytest.mark.parametrize("reason", list(REFUSED))
def test_a_layer_that_is_not_exact_is_refused_with_its_reason(reason):
    assert reason in held(REFUSED[reason])


def test_numbers_are_written_as_they_are():
    for dtype, number in ((torch.float32, 0), (torch.float16, 1), (torch.bfloat16, 30)):
        values = torch.randn(3, 5).to(dtype)
        blocks = plain(values)
        assert blocks.type_number == number and torch.equal(blocks.data.view(dtype), values)
    vector = plain(torch.arange(6.0)).ordered(torch.tensor([3, 4, 5, 0, 1, 2]))
    assert vector.shape == (6,) and vector.data.view(torch.float32)[0].tolist() == [3, 4, 5, 0, 1, 2]


def test_steps_without_minimums_start_at_zero():
    term = Stepped.from_codes(torch.arange(32)[None] % 16, torch.ones(1, 1).half(), None, bits=4, group_size=32)
    assert torch.equal(read_term(TYPES["q4_1"], held(layer(term)).data).decode(), term.decode())
