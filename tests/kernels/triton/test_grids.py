"""Uniform grids of every width, kind of zero points, group, dtype and ragged shape against the torch definition, in the interpreter."""

import pytest
import torch
from torch import Tensor

from fewbits.formats.uniform import Uniform

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Whole rows, groups of a tile and of parts of one, groups that no power of two holds, and single columns.
SHAPES = ((9, 300, None), (5, 700, 256), (10, 390, 128), (3, 130, 32), (9, 250, 24), (4, 70, 5), (8, 40, 1), (1, 1, None))
VECTORS = (1, 2, 7, 8, 9, 20, 33)


def reach(term: Uniform) -> Tensor:
    """The largest |code * scale| + |zero * scale| of a row, `[rows]`."""
    largest = (2**term.bits_per_code - 1 + term.unpacked_zero_points().abs()) * term.scales.float().abs()
    return largest.amax(1).expand(term.rows)


@pytest.mark.parametrize("zeros", ["symmetric", "integer", "real"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_meets_every_grid_shape_dtype_and_batch(assert_agrees, uniform, bits, zeros):
    half = (bits + len(zeros)) % 2  # of the shapes: every width meets both halves
    for place, shape in list(enumerate(SHAPES))[half::2]:
        turn = place + bits + len(zeros)  # so that dtypes and batches go round
        term = uniform(bits, *shape, zeros, DTYPES[turn % 3], shared=turn % 5 == 0, seed=bits)
        inputs = torch.randn(VECTORS[turn % 7], shape[1], generator=torch.Generator().manual_seed(place)).to(DTYPES[turn // 3 % 3])
        assert_agrees(term, inputs, reach(term))


@pytest.mark.parametrize("bits", range(1, 9))
def test_decoding_is_bit_for_bit_the_definition(on_gpu, uniform, bits):
    for place, shape in enumerate(SHAPES[bits % 4 :: 4]):
        term = uniform(bits, *shape, ("symmetric", "integer", "real")[(place + bits) % 3], DTYPES[(place + bits) % 2], seed=bits)
        dtype = DTYPES[place % 3]
        assert torch.equal(term.decode(dtype), term.define(dtype))
