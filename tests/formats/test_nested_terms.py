"""Terms made of other terms: scaled, added, read unrounded; and the one-bit order of columns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, from_stored
from fewbits.formats.dense import Dense
from fewbits.formats.permutation import Partition
from fewbits.formats.scaled import ColumnScaled
from fewbits.formats.sparse import Pattern
from fewbits.formats.total import ColumnOffsets, Total
from fewbits.formats.unrounded import Unrounded

GENERATOR = torch.Generator().manual_seed(0)
MATRIX, OTHER, INPUTS = (torch.randn(*shape, generator=GENERATOR) for shape in ((3, 5), (3, 5), (4, 5)))


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (ColumnScaled(Dense(MATRIX), torch.arange(1.0, 6.0)), MATRIX * torch.arange(1.0, 6.0)),
        (Total((Dense(MATRIX), Dense(OTHER))), MATRIX + OTHER),
        (ColumnOffsets(torch.arange(5.0), 3), torch.arange(5.0).expand(3, 5)),
        (Unrounded(Dense(MATRIX)), MATRIX),
    ],
)
def test_it_decodes_multiplies_and_comes_back(term, expected):
    torch.testing.assert_close(term.decode(), expected)
    torch.testing.assert_close(term.matmul(INPUTS), INPUTS @ expected.T)
    torch.testing.assert_close(term.matmul(INPUTS[None]), (INPUTS @ expected.T)[None])
    assert term.shape == (3, 5) and torch.equal(from_stored(term.settings(), term.tensors()).decode(), term.decode())


def test_only_terms_that_do_not_mind_read_rounded_inputs():
    tensor = CompressedTensor((Dense(MATRIX), Unrounded(Dense(OTHER))))
    torch.testing.assert_close(tensor.matmul(INPUTS, torch.round), INPUTS.round() @ MATRIX.T + INPUTS @ OTHER.T)
    torch.testing.assert_close(tensor.matmul(INPUTS), INPUTS @ (MATRIX + OTHER).T)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(InputError, match="does not fit 5 columns"):
        ColumnScaled(Dense(MATRIX), torch.ones(4))
    with pytest.raises(InputError, match="cannot be added"):
        Total((Dense(MATRIX), Dense(MATRIX.T)))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_chosen_features_come_first_for_a_bit_each(mask):
    mask = torch.tensor(mask)
    vectors = torch.randn(2, len(mask), generator=GENERATOR)
    partition = Partition.from_mask(mask)
    torch.testing.assert_close(partition.apply(vectors), torch.cat([vectors[:, mask], vectors[:, ~mask]], 1))
    torch.testing.assert_close(partition.inverse().apply(partition.apply(vectors)), vectors)
    torch.testing.assert_close(partition.transpose().apply(partition.apply(vectors)), vectors)
    assert sum(partition.bits().values()) == 8 * -(-len(mask) // 8)
    assert torch.equal(from_stored(partition.settings(), partition.tensors()).mask(), mask)


def test_a_pattern_may_end_inside_its_last_unit():
    mask = torch.tensor([[True, False, True], [False, True, True]])
    values = torch.arange(1.0, 17.0).view(2, 8)
    term = Pattern.from_mask(mask, Dense(values), kept=2, span=3, unit=4, columns=10)
    assert term.decode().tolist() == [[1, 2, 3, 4, 0, 0, 0, 0, 5, 6], [0, 0, 0, 0, 9, 10, 11, 12, 13, 14]]
    with pytest.raises(InputError, match="8 columns do not fit 3 units of 4"):
        Pattern.from_mask(mask, Dense(values), kept=2, span=3, unit=4, columns=8)
