"""What an integer kernel computes for 4-bit weights and inputs in blocks of 4 and 8 bits, in plain torch.

Weights are widened to int8 without their sign being extended: a code in the high half of a byte is 16 times its value, and the
scale is a 16th. With the first code of each pair in the high half, one mask and one shift widen two (COMET, arXiv 2410.12168).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.packing import pack
from fewbits.formats.uniform import Uniform
from fewbits.layers.block_activation import BlockQuantizer


def swapped_pairs(term: Uniform) -> Tensor:
    """Signed 4-bit codes in two's complement, uint8 `[rows, columns / 2]`, the first of each pair in the high half.

    Raises InputError for other terms than symmetric ones of 4 bits.
    """
    if term.bits_per_code != 4 or term.zero_points is not None:
        raise InputError(f"integer products read symmetric codes of 4 bits, not {term.bits_per_code} with zero points")
    codes = torch.nn.functional.pad(term.unpacked_codes(), (0, term.columns % 2), value=8)
    # The pack of the library puts the first code into the low half, and codes are 0 to 15 with 8 for zero.
    return pack(codes.view(len(codes), -1, 2).flip(-1).flatten(1), 4) ^ 0x88


def widened(pairs: Tensor, columns: int) -> Tensor:
    """int8 `[rows, columns]`, 16 times the signed codes in `pairs`."""
    both = torch.stack([pairs & 0xF0, pairs << 4], dim=-1)
    return both.view(torch.int8).flatten(1)[:, :columns]


def block_product(weight: CompressedTensor, quantizer: BlockQuantizer, inputs: Tensor) -> Tensor:
    """`inputs [..., columns]` to float32 `[..., rows]`: int32 sums inside every block, scaled and added up in float32.

    A sum of 128 products of -128..127 and -127..127 is far within int32. Raises InputError where the weight is not one
    symmetric 4-bit term whose groups are the quantizer's blocks.
    """
    term = weight.terms[0]
    if len(weight.terms) > 1 or not isinstance(term, Uniform) or term.group_size != min(quantizer.block_size, term.columns):
        raise InputError("integer products read one uniform term whose groups are the blocks of the inputs")
    for transform in weight.input_transforms:
        inputs = transform.apply(inputs)
    codes, input_scales = quantizer.codes(inputs)
    scales = cast(Tensor, term.scales).float() / 16  # exact: a power of two
    integers = widened(swapped_pairs(term), term.columns).int()
    total = torch.zeros(*codes.shape[:-1], term.rows)
    pairs = zip(codes.int().split(term.group_size, -1), integers.split(term.group_size, -1), strict=True)
    for block, (left, right) in enumerate(pairs):
        total += (left @ right.T).float() * input_scales[..., block, None] * scales[:, block]
    for transform in weight.output_transforms:
        total = transform.apply(total)
    return total
