import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.formats.packing import pack, packed_width, unpack


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(1, 24), rows=st.integers(0, 5), columns=st.integers(1, 41), seed=st.integers(0, 99))
def test_every_width_and_ragged_shape_comes_back(bits, rows, columns, seed):
    dtype = torch.uint8 if bits <= 8 else torch.int32
    codes = torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=dtype)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_width(columns, bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, columns), codes)


def test_a_row_is_the_bit_stream_computed_by_hand():
    # 3-bit codes 5, 2, 7 = 101, 010, 111; little-endian stream 101 010 111 -> bytes 0b11010101 and 0b1
    assert pack(torch.tensor([[5, 2, 7]]), 3).tolist() == [[0b11010101, 0b1]]


@pytest.mark.parametrize(("codes", "bits", "says"), [([[4]], 2, "do not fit in 2 bits"), ([[0]], 25, "1 to 24"), ([[-1]], 4, "do not fit")])
def test_what_cannot_be_packed_is_refused(codes, bits, says):
    with pytest.raises(InputError, match=says):
        pack(torch.tensor(codes), bits)


def test_rows_of_the_wrong_length_are_refused():
    with pytest.raises(InputError, match="2 would"):
        unpack(torch.zeros(1, 3, dtype=torch.uint8), 3, 5)
