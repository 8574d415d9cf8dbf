import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.layers.block_activation import BlockQuantizer
from fewbits.layers.group_activation import GroupQuantizer

WIDE = torch.tensor([True, False, False])


def test_every_block_of_a_token_rounds_alone_and_wide_ones_finely():
    inputs = torch.tensor([[127.0, 3.4, 7.0, 3.4, 14.0]])
    codes, scales = BlockQuantizer.from_blocks(WIDE, 5, 2).codes(inputs)
    assert codes.tolist() == [[127, 3, 7, 3, 7]] and codes.dtype == torch.int8  # the last block holds one feature
    assert scales.tolist() == [[1.0, 1.0, 2.0]]
    narrow = BlockQuantizer.from_blocks(~WIDE, 5, 2)
    assert narrow.codes(inputs)[0][0, :2].tolist() == [7, 0]  # 3.4 is lost beside 127 on a grid of 4 bits
    assert narrow.codes(-inputs)[0].tolist() == (-narrow.codes(inputs)[0]).tolist()
    assert int(narrow.codes(-inputs)[0].min()) == -127 and narrow.is_wide().tolist() == [False, True, True]


def test_with_one_width_it_is_the_group_quantizer_up_to_the_scales_in_fp16():
    inputs = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    for bits, wide in ((4, False), (8, True)):
        found = BlockQuantizer.from_blocks(torch.full((3,), wide), 40, 16).apply(inputs)
        expected = GroupQuantizer(bits, 16).apply(inputs)
        step = inputs.abs().max() / (2 ** (bits - 1) - 1)
        assert float((found - expected).abs().median()) < 1e-3 and float((found - expected).abs().max()) < 1.01 * step


def test_scales_are_numbers_of_fp16():
    inputs = 1e6 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for factor in (1.0, 1e-6, 1e-13, 0.0):
        quantizer = BlockQuantizer.from_blocks(torch.tensor([False, True]), 8, 4)
        codes, scales = quantizer.codes(inputs * factor)
        assert torch.equal(scales, scales.half().float()) and bool(quantizer.apply(inputs * factor).isfinite().all())
        assert int(codes[:, :4].abs().max()) <= 7 and int(codes.int().abs().max()) <= 127
    assert torch.equal(BlockQuantizer.from_blocks(WIDE, 5, 2).apply(torch.zeros(2, 5)), torch.zeros(2, 5))


def test_fixed_scales_are_stored_and_cut_off_what_is_larger():
    largest = torch.tensor([1.0, 127.0, 7.0, 3.0])
    quantizer = BlockQuantizer.from_blocks(torch.tensor([True, False]), 4, 2, largest=largest)
    assert quantizer.scales.tolist() == [1.0, 1.0] and quantizer.scales.dtype == torch.float16
    assert quantizer.apply(torch.tensor([[300.0, 2.4, -9.0, 1.0]])).tolist() == [[127.0, 2.0, -7.0, 1.0]]
    assert quantizer.bits() == {"wide": 8, "scales": 32}
    again = from_stored(quantizer.settings(), quantizer.tensors())
    inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.apply(inputs), quantizer.apply(inputs))


def test_the_flags_are_one_bit_a_block():
    wide = torch.rand(19, generator=torch.Generator().manual_seed(0)) < 0.3
    quantizer = BlockQuantizer.from_blocks(wide, 145, 8)
    assert quantizer.bits() == {"wide": 24} and torch.equal(quantizer.is_wide(), wide)
    counts = [8] * 18 + [1]
    assert quantizer.wide_share() == pytest.approx(sum(n for n, one in zip(counts, wide.tolist(), strict=True) if one) / 145)
    again = from_stored(quantizer.settings(), quantizer.tensors())
    inputs = torch.randn(2, 3, 145, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.apply(inputs), quantizer.apply(inputs)) and again.apply(inputs.bfloat16()).dtype == torch.bfloat16


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match=r"\[3\] blocks of 2 do not fit 7 features"):
        BlockQuantizer.from_blocks(WIDE, 7, 2)
    for bits in ((1, 8), (8, 4), (4, 9)):
        with pytest.raises(InputError, match=f"{bits[0]} and {bits[1]} bits"):
            BlockQuantizer.from_blocks(WIDE, 5, 2, bits=bits)
    with pytest.raises(InputError, match="not finite"):
        BlockQuantizer.from_blocks(WIDE, 5, 2, largest=torch.full((5,), torch.inf))
