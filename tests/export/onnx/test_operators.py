"""How codes lie in MatMulNBits and DequantizeLinear: by hand, by readers of the descriptions, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.export.grids import Grid
from fewbits.export.onnx.operators import NBits, Quantized


def grid(bits, rows, columns, size, symmetric, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // size)
    codes = torch.randint(2**bits, (rows, columns), generator=generator).to(torch.uint8)
    zeros = torch.randint(2**bits, (rows, groups), generator=generator).to(torch.uint8)
    zeros = torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
    return Grid(codes, (torch.rand(rows, groups, generator=generator) + 0.01).half(), zeros, symmetric, bits, min(size, columns))


def values(grid):
    scales, zeros = (one.float().repeat_interleave(grid.group_size, 1)[:, : grid.codes.shape[1]] for one in (grid.scales, grid.zero_points))
    return (grid.codes.float() - zeros) * scales


def codes_in(data, bits, count):
    """Code k is in byte k * bits // 8, the first in the lowest bits."""
    return [(int(data[k * bits // 8]) >> (k * bits % 8)) & (2**bits - 1) for k in range(count)]


def nbits_as_described(held):
    """The matrix `[N, K]` by the operator's description alone."""
    rows, blocks, _ = held.blob.shape
    found = torch.zeros(rows, held.columns)
    for row in range(rows):
        zeros = [2 ** (held.bits - 1)] * blocks if held.zero_points is None else codes_in(held.zero_points[row], held.bits, blocks)
        for block in range(blocks):
            first = block * held.block
            numbers = codes_in(held.blob[row, block], held.bits, held.block)[: held.columns - first]
            found[row, first : first + len(numbers)] = (torch.tensor(numbers).float() - zeros[block]) * held.scales[row, block]
    return found


def dequantized_as_described(held):
    """The matrix `[K, N]` by the operator's description alone."""
    columns, rows = held.shape

    def whole(data, count):
        numbers = torch.tensor(codes_in(data.flatten(), held.bits, count)).float()
        return torch.where(numbers >= 2 ** (held.bits - 1), numbers - 2**held.bits, numbers) if held.zero_points is None else numbers

    codes = whole(held.codes, columns * rows).view(columns, rows)
    groups = held.scales.numel() // rows
    zeros = torch.zeros(groups, rows) if held.zero_points is None else whole(held.zero_points, groups * rows).view(groups, rows)
    group = torch.arange(columns) // (held.group_size or columns)
    return (codes - zeros[group]) * held.scales.view(groups, rows)[group]


def test_the_bytes_are_those_of_a_row_by_hand():
    """Codes 0 to 15, then 15 to 0, in two blocks of 16: the first of two in the low half; zero points 3 and 12 in one byte."""
    codes = torch.cat([torch.arange(16), torch.arange(15, -1, -1)])[None].to(torch.uint8)
    one = Grid(codes, torch.tensor([[0.5, 2.0]]).half(), torch.tensor([[3, 12]], dtype=torch.uint8), False, 4, 16)
    held = NBits.of(one)
    assert bytes(held.blob[0, 0].tolist()).hex() == "1032547698badcfe" and bytes(held.blob[0, 1].tolist()).hex() == "efcdab8967452301"
    assert held.zero_points.tolist() == [[0xC3]] and held.scales.tolist() == [[0.5, 2.0]] and held.block == 16
    two = NBits.of(Grid(codes % 4, one.scales[:, :1], one.zero_points[:, :1] % 4, False, 2, 32))
    assert bytes(two.blob[0, 0].tolist()).hex() == "e4e4e4e4" + "1b1b1b1b" and two.zero_points.tolist() == [[3]] and two.block == 32
    signed = Quantized.of(Grid(torch.tensor([[0, 8], [15, 9]], dtype=torch.uint8), one.scales.T[:, :1], codes[:, :1], True, 4, 2))
    assert signed.codes.tolist() == [0x78, 0x10] and signed.zero_points is None and signed.shape == (2, 2)


SIZES = st.sampled_from([16, 32, 48, 64, 96, 128, 320, 1000])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 5), st.integers(1, 300), SIZES, st.booleans(), st.integers(0, 99))
def test_matmul_nbits_holds_the_same_numbers_and_reads_back(bits, rows, columns, size, symmetric, seed):
    one = grid(bits, rows, columns, size, symmetric, seed)
    held = NBits.of(one)
    assert held.block in (16, 32, 64, 128, 256) and held.blob.shape[2] * 8 == held.block * bits
    assert torch.equal(nbits_as_described(held), values(one))
    again = held.grid()
    assert torch.equal(again.codes, one.codes) and again.symmetric == symmetric
    assert torch.equal(values(again), values(one))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 100), st.sampled_from([8, 24, 32, 1000]), st.booleans(), st.integers(0, 99)
)
def test_dequantize_linear_holds_the_same_numbers_and_reads_back(bits, rows, columns, size, symmetric, seed):
    one = grid(bits, rows, columns, size, symmetric, seed)
    held = Quantized.of(one)
    assert torch.equal(dequantized_as_described(held).T, values(one))
    again = held.grid()
    assert torch.equal(again.codes, one.codes) and torch.equal(again.zero_points, one.zero_points)
    assert again.symmetric == symmetric and again.group_size == one.group_size and torch.equal(values(again), values(one))


def test_what_lies_behind_the_last_column_stands_for_zero():
    held = NBits.of(grid(4, 3, 20, 32, False))
    whole = NBits(held.blob, held.scales, held.zero_points, 32, 4)
    assert torch.equal(nbits_as_described(whole)[:, 20:], torch.zeros(3, 12))


@pytest.mark.parametrize("bits", [1, 3, 5, 6, 7])
def test_widths_without_an_operator_are_refused(bits):
    one = grid(bits, 2, 32, 16, False)
    assert NBits.of(one) == f"its codes have {bits} bits, where MatMulNBits has 2, 4 and 8"
    assert Quantized.of(one) == f"its codes have {bits} bits, where DequantizeLinear has 4 and 8"


def test_damaged_numbers_are_named():
    held = NBits.of(grid(4, 2, 64, 32, False))
    with pytest.raises(InputError, match=r"2 scales and blobs \[2, 2, 16\] do not fit 2 rows of 64 codes"):
        NBits(held.blob, held.scales[:, :1], held.zero_points, 64, 4).grid()
    other = Quantized.of(grid(4, 2, 64, 32, False))
    with pytest.raises(InputError, match="63 bytes cannot hold 128 codes of 4 bits; 64 would"):
        Quantized(other.codes[:-1], other.scales, other.zero_points, (64, 2), 4, 32).grid()
    with pytest.raises(InputError, match="2 scales do not fit 2 rows of 2 groups"):
        Quantized(other.codes, other.scales[:1], other.zero_points, (64, 2), 4, 32).grid()
