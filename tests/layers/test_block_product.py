import numpy as np
import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.front import Front
from fewbits.formats.uniform import Uniform
from fewbits.layers.block_activation import BlockQuantizer
from fewbits.layers.block_product import block_product, swapped_pairs, widened


def problem(rows=6, columns=40, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (rows, columns), generator=generator)
    codes[0, :16] = torch.arange(16)  # every code
    scales = torch.rand(rows, -(-columns // size), generator=generator).half()
    term = Uniform.from_codes(codes.to(torch.uint8), scales, None, bits=4, group_size=size)
    return codes, term, torch.randn(2, 5, columns, generator=generator) * 3


def test_one_mask_and_one_shift_widen_a_pair():
    term = Uniform.from_codes(torch.tensor([[0, 15, 8, 7, 9]], dtype=torch.uint8), torch.ones(1, 1), None, bits=4)
    pairs = swapped_pairs(term)
    assert pairs.tolist() == [[0x87, 0x0F, 0x10]]  # -8 and 7, 0 and -1, 1 and nothing
    assert widened(pairs, 5).tolist() == [[-128, 112, 0, -16, 16]] and widened(pairs, 5).dtype == torch.int8


@pytest.mark.parametrize(("columns", "size"), [(40, 16), (37, 16), (32, 32), (20, 128)])
def test_high_halves_and_a_16th_of_the_scale_are_the_plain_integer_product(columns, size):
    size = min(size, columns)
    codes, term, inputs = problem(columns=columns, size=size)
    wide = torch.arange(-(-columns // size)) % 2 == 0
    quantizer = BlockQuantizer.from_blocks(wide, columns, size)
    assert torch.equal(widened(swapped_pairs(term), columns).int(), 16 * (codes.int() - 8))
    found = block_product(CompressedTensor((term,)), quantizer, inputs)
    left, input_scales = (one.numpy() for one in quantizer.codes(inputs))
    right, expected = codes.numpy().astype(np.int64) - 8, np.zeros((*inputs.shape[:-1], term.rows), np.float32)
    for block, start in enumerate(range(0, columns, size)):
        sums = left[..., start : start + size].astype(np.int64) @ right[:, start : start + size].T
        expected += sums.astype(np.float32) * input_scales[..., block, None] * term.scales[:, block].float().numpy()
    assert np.array_equal(found.numpy(), expected)  # not close: equal


def test_it_computes_what_the_layer_computes():
    _, term, inputs = problem(size=8)
    quantizer = BlockQuantizer.from_blocks(torch.tensor([True, True, False, False, False]), 40, 8)
    tensor = CompressedTensor((term,), (Front.from_first(torch.tensor([38, 4]), 40),))
    torch.testing.assert_close(block_product(tensor, quantizer, inputs), tensor.matmul(inputs, quantizer.apply), rtol=1e-5, atol=1e-4)


def test_the_largest_sum_of_a_block_of_128_is_exact():
    term = Uniform.from_codes(torch.zeros(1, 128, dtype=torch.uint8), torch.ones(1, 1).half(), None, bits=4, group_size=128)
    inputs = torch.full((1, 128), 127.0)
    quantizer = BlockQuantizer.from_blocks(torch.tensor([True]), 128, 128)
    assert float(block_product(CompressedTensor((term,)), quantizer, inputs)) == -128 * 127 * 8


def test_other_weights_are_refused():
    _, term, inputs = problem()
    other = BlockQuantizer.from_blocks(torch.zeros(5, dtype=torch.bool), 40, 8)
    with pytest.raises(InputError, match="groups are the blocks"):
        block_product(CompressedTensor((term,)), other, inputs)
    zeros = torch.zeros(6, 3, dtype=torch.uint8)
    whole = Uniform.from_codes(term.unpacked_codes(), term.scales, zeros, bits=4, group_size=16)
    with pytest.raises(InputError, match="symmetric codes of 4 bits"):
        swapped_pairs(whole)
