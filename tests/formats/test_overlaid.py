"""Numbers over, and around, another term: what each stands for, and what joins without a stored number written anew."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.formats.affine import Affine
from fewbits.formats.codebook import Codebook
from fewbits.formats.dense import Dense
from fewbits.formats.overlaid import Overlaid
from fewbits.formats.row_blocks import RowBlocks

LEVELS = torch.tensor([[[-1.0, -0.25, 0.5, 2.0]]]).half()


def coded(rows, columns):
    return Codebook.from_codes(torch.randint(4, (rows, columns)), LEVELS, bits=2)


def affine(rows, columns, by_row=True):
    count = rows if by_row else columns
    generator = torch.Generator().manual_seed(columns)  # the same for all terms of one width
    numbers = [torch.randn(count, generator=None if by_row else generator).half() for _ in range(2)]
    return Affine(coded(rows, columns), *numbers, by_row=by_row)


def overlaid(rows, columns, equal=False):
    matrix = torch.randn(rows, columns)
    order = matrix.argsort(1).argsort(1)
    return Overlaid.from_mask(affine(rows, columns, by_row=equal), matrix, (order < 2) if equal else matrix > 1, equal=equal)


TERMS = {
    "codebook": coded,
    "affine_rows": affine,
    "affine_columns": lambda r, c: affine(r, c, by_row=False),
    "overlaid": overlaid,
    "overlaid_equal": lambda r, c: overlaid(r, c, equal=True),
    "row_blocks": lambda r, c: RowBlocks((Dense(torch.randn(1, c).half()), overlaid(r, c))),
}


@pytest.mark.parametrize("kind", list(TERMS))
@settings(max_examples=15, deadline=None)
@given(first=st.integers(1, 5), second=st.integers(1, 5), columns=st.integers(2, 300), seed=st.integers(0, 99))
def test_terms_join_by_rows_and_come_back_from_what_is_stored(kind, first, second, columns, seed):
    torch.manual_seed(seed)
    above, below = TERMS[kind](first, columns), TERMS[kind](second, columns)
    joined = above.stacked(below)
    whole = torch.cat([above.decode(), below.decode()])
    assert torch.equal(joined.decode(), whole) and joined.shape == tuple(whole.shape)
    again = from_stored(joined.settings(), joined.tensors())
    assert torch.equal(again.decode(), whole)
    inputs = torch.randn(3, columns)
    torch.testing.assert_close(joined.matmul(inputs), inputs @ whole.T, rtol=1e-4, atol=1e-4)


def test_by_hand():
    base = Affine(
        Codebook.from_codes(torch.tensor([[0, 1], [2, 3]]), LEVELS, bits=2), torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.0]), True
    )
    assert base.decode().tolist() == [[-1.0, 0.5], [2.0, 8.0]]
    columns = Affine(base.inner, torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.0]), False)
    assert columns.decode().tolist() == [[-1.0, -1.0], [2.0, 8.0]]
    found = Overlaid.from_mask(base, torch.tensor([[7.0, 8.0], [9.0, 10.0]]), torch.tensor([[False, True], [False, False]]))
    assert found.decode().tolist() == [[-1.0, 8.0], [2.0, 8.0]]
    assert found.values.tolist() == [8.0] and found.column_indices.tolist() == [1] and found.row_counts.tolist() == [1, 0]
    assert base.decode().tolist() == [[-1.0, 0.5], [2.0, 8.0]]


def test_indices_and_counts_take_the_bytes_they_need():
    for columns, index, count in ((255, "uint8", "uint8"), (256, "uint8", "int16"), (257, "int16", "int16"), (2**15 + 1, "int32", "int32")):
        found = Overlaid.from_mask(Dense(torch.zeros(1, columns)), torch.ones(1, columns), torch.ones(1, columns, dtype=torch.bool))
        assert str(found.column_indices.dtype) == f"torch.{index}" and str(found.row_counts.dtype) == f"torch.{count}"
        assert torch.equal(found.decode(), torch.ones(1, columns))


def test_what_differs_is_not_joined():
    torch.manual_seed(0)
    codes, other = coded(2, 8), Codebook.from_codes(torch.randint(4, (2, 8)), LEVELS + 1, bits=2)
    assert codes.stacked(other) is None and codes.stacked(coded(2, 9)) is None
    assert codes.stacked(Codebook.from_codes(torch.zeros(2, 8), LEVELS, torch.ones(2, 1), bits=2)) is None
    left, right = affine(2, 8, by_row=False), affine(2, 8, by_row=False)
    assert left.stacked(right) is not None and left.stacked(Affine(right.inner, right.scales, right.centers + 1, False)) is None
    assert overlaid(2, 8).stacked(overlaid(2, 8, equal=True)) is None
    matrix = torch.randn(2, 8)
    one = Overlaid.from_mask(affine(2, 8), matrix, matrix == matrix.amax(1, keepdim=True), equal=True)
    assert one.stacked(overlaid(2, 8, equal=True)) is None  # one entry a row under two
    assert RowBlocks((codes,)).stacked(coded(1, 9)) is None
    mixed = RowBlocks((codes,)).stacked(Dense(torch.ones(1, 8)))
    assert len(mixed.parts) == 2 and len(mixed.stacked(Dense(torch.ones(3, 8))).parts) == 2


def test_wrong_shapes_and_numbers():
    dense, mask = Dense(torch.zeros(2, 3)), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(InputError, match=r"\[2, 3\] would for both"):
        Overlaid.from_mask(dense, torch.zeros(2, 4), mask)
    with pytest.raises(InputError, match=r"not finite in torch\.float16"):
        Overlaid.from_mask(dense, torch.full((2, 3), 1e6), mask)
    with pytest.raises(InputError, match="equally many"):
        Overlaid.from_mask(dense, torch.zeros(2, 3), torch.eye(2, 3).bool() | torch.tensor([[True], [False]]), equal=True)
    with pytest.raises(InputError, match=r"\[2\] would for both"):
        Affine(dense, torch.zeros(3), torch.zeros(3), by_row=True)
    with pytest.raises(InputError, match="one under the other"):
        RowBlocks((dense, Dense(torch.zeros(2, 4))))
