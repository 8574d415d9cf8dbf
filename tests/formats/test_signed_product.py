import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, from_stored
from fewbits.formats.signed_product import SignedProduct, pack_signs, unpack_signs

GENERATOR = torch.Generator().manual_seed(0)


def made(rows, columns, rank=2):
    shapes = (rows, columns), (rows, rank), (rank, columns)
    return [torch.randn(*shape, generator=GENERATOR) for shape in shapes]


def test_signs_are_packed_from_the_highest_bit_and_the_last_byte_is_padded_by_zeros():
    plus = torch.tensor([[True, False, False, True, True], [False, True, True, True, False]])
    assert pack_signs(plus).tolist() == [0b10011011, 0b10000000]
    assert pack_signs(torch.ones(1, 8, dtype=torch.bool)).tolist() == [255]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 20))
def test_packing_loses_nothing(rows, columns):
    plus = torch.rand(rows, columns, generator=GENERATOR) < 0.5
    packed = pack_signs(plus)
    assert packed.dtype == torch.uint8 and len(packed) == -(-rows * columns // 8)
    assert torch.equal(unpack_signs(packed, (rows, columns)), plus)


def test_it_is_the_signs_times_the_product_of_the_factors_in_fp16():
    values, left, right = made(5, 7)
    term = SignedProduct.from_signs(values, left, right)
    expected = torch.sign(values) * (left.half().float() @ right.half().float())
    torch.testing.assert_close(term.decode(), expected)
    inputs = torch.randn(2, 3, 7, generator=GENERATOR)
    torch.testing.assert_close(term.matmul(inputs), inputs @ expected.T)
    again = from_stored(term.settings(), term.tensors())
    assert torch.equal(again.decode(), term.decode()) and again.shape == (5, 7)
    assert term.bits() == {"signs": 40, "left": 16 * 10, "right": 16 * 14}


def test_zero_counts_as_plus_and_a_negative_product_stays_negative():
    values = torch.tensor([[0.0, -0.0, -1.0, 2.0]])
    term = SignedProduct.from_signs(values, torch.tensor([[1.0]]), torch.tensor([[3.0, -3.0, 3.0, -3.0]]))
    assert term.decode().tolist() == [[3, -3, -3, -3]]


def test_any_first_terms_are_a_tensor_and_the_next_adds_one_addend():
    terms = tuple(SignedProduct.from_signs(*made(6, 11)) for _ in range(4))
    for count in range(1, 4):
        less, more = CompressedTensor(terms[:count]), CompressedTensor(terms[: count + 1])
        assert torch.equal(more.decode(), less.decode() + terms[count].decode())
        assert sum(more.bits().values()) - sum(less.bits().values()) == sum(terms[count].bits().values())


def test_parts_that_do_not_fit_are_named():
    values, left, right = made(5, 7)
    with pytest.raises(InputError, match=r"factors of one rank and \[5\] bytes"):
        SignedProduct(pack_signs(values >= 0)[:4], left.half(), right.half())
    with pytest.raises(InputError, match="do not fit"):
        SignedProduct(pack_signs(values >= 0), left.half(), right[:1].half())
