"""Codes in words of 32 bits."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.export.words import from_padded_words, from_words, to_words


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_words_are_those_of_the_package_and_read_back(bits, rows, columns, seed):
    codes = torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = to_words(codes, bits)
    theirs = pack_to_int32((codes.short() - 2 ** (bits - 1)).to(torch.int8), bits)
    assert torch.equal(words, theirs)
    assert torch.equal(from_words(words, bits, columns), codes)


def test_words_by_hand():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]], dtype=torch.uint8)
    stream = sum(int(code) << 3 * i for i, code in enumerate(codes[0]))
    assert [word & 0xFFFFFFFF for word in to_words(codes, 3)[0].tolist()] == [stream & 0xFFFFFFFF, stream >> 32]


def test_a_single_row_that_is_a_transpose_packs_as_any_other():
    column = torch.arange(64, dtype=torch.uint8)[:, None] % 4
    assert torch.equal(to_words(column.T, 2), to_words(column.T.clone(), 2))
    assert torch.equal(from_words(to_words(column.T, 2).T.contiguous().T, 2, 64), column.T)


def test_words_with_spare_bits_are_read():
    """Ten codes of three bits a word, two bits of each word unused: what compressed-tensors wrote before 0.18."""
    codes = torch.randint(8, (2, 23), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    words = torch.zeros(2, 3, dtype=torch.int64)
    for column in range(23):
        words[:, column // 10] |= codes[:, column].long() << 3 * (column % 10)
    assert torch.equal(from_padded_words(words.to(torch.int32), 3, 23), codes)


@pytest.mark.parametrize("read", [from_words, from_padded_words])
def test_words_of_another_number_of_codes_are_refused(read):
    with pytest.raises(InputError, match="cannot hold 40 codes of 4 bits; 5 would"):
        read(torch.zeros(2, 4, dtype=torch.int32), 4, 40)
