import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.formats.dense import Dense
from fewbits.formats.row_classes import RowClasses, rows_of


@settings(deadline=None, max_examples=60)
@given(blocks=st.integers(1, 4), rows=st.integers(1, 19), width=st.integers(1, 3), seed=st.integers(0, 999))
def test_rows_come_back_in_their_order_whatever_each_block_chooses(blocks, rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, blocks * width, generator=generator)
    count = int(torch.randint(0, rows + 1, (), generator=generator))
    mask = torch.rand(blocks, rows, generator=generator).argsort(1) < count
    classes = [Dense(rows_of(matrix, one)) if bool(one.any()) else None for one in (mask, ~mask)]
    term = RowClasses.from_mask(mask, *classes)
    assert torch.equal(term.decode(), matrix) and torch.equal(term.mask(), mask) and term.shape == matrix.shape
    assert sum(term.bits().values()) == matrix.numel() * 32 + blocks * 8 * -(-rows // 8)
    again = from_stored(term.settings(), term.tensors())
    assert torch.equal(again.decode(), matrix)


def test_by_hand():
    matrix = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    mask = torch.tensor([[True, False, False], [False, False, True]])
    assert rows_of(matrix, mask).tolist() == [[1.0, 30.0]]
    assert rows_of(matrix, ~mask).tolist() == [[2.0, 10.0], [3.0, 20.0]]
    assert RowClasses.from_mask(mask, Dense(rows_of(matrix, mask)), Dense(rows_of(matrix, ~mask))).flags.tolist() == [[1], [4]]


def test_what_does_not_fit_is_refused():
    one, two = Dense(torch.ones(1, 4)), Dense(torch.ones(2, 4))
    with pytest.raises(InputError, match=r"choose \[1, 2\] rows where the chosen class has 1"):
        RowClasses.from_mask(torch.tensor([[True, False, False], [True, True, False]]), one, two)
    with pytest.raises(InputError, match="do not make 4 rows"):
        RowClasses.from_mask(torch.tensor([[True, False, False, False]]), one, two)
    with pytest.raises(InputError, match="in 3 blocks"):
        RowClasses.from_mask(torch.tensor([[True, False, False]] * 3), one, two)
    with pytest.raises(InputError, match="do not make 0 rows"):
        RowClasses.from_mask(torch.zeros(1, 0, dtype=torch.bool), None, None)
