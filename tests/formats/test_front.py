import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, from_stored
from fewbits.formats.dense import Dense
from fewbits.formats.front import Front


def test_chosen_features_come_first_and_the_others_stay_in_order():
    front = Front.from_first(torch.tensor([4, 1]), 6)
    assert front.order().tolist() == [4, 1, 0, 2, 3, 5]
    assert front.apply(torch.arange(6.0)).tolist() == [4, 1, 0, 2, 3, 5]
    assert front.inverse().apply(front.apply(torch.arange(6.0))).tolist() == list(range(6))
    assert front.bits() == {"first": 32}  # two of int16, however many features there are
    assert Front.from_first(torch.tensor([], dtype=torch.int64), 3).order().tolist() == [0, 1, 2]


def test_it_is_a_permutation_matrix_and_read_back_as_it_was():
    front = Front.from_first(torch.tensor([3, 0, 6]), 7)
    matrix = front.apply(torch.eye(7)).T
    assert torch.equal(front.transpose().apply(torch.eye(7)).T, matrix.T)
    again = from_stored(front.settings(), front.tensors())
    assert torch.equal(again.apply(torch.eye(7)), front.apply(torch.eye(7)))


def test_permuted_inputs_and_columns_leave_the_product_as_it_was():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(9, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    front = Front.from_first(torch.tensor([33, 2, 17]), 40)
    tensor = CompressedTensor((Dense(weight[:, front.order()]),), (front,))
    torch.testing.assert_close(tensor.matmul(inputs), inputs @ weight.T)
    assert torch.equal(tensor.decode(torch.float64).float(), weight.float())


@pytest.mark.parametrize("first", [[1, 1], [4], [-1]])
def test_features_that_are_not_different_ones_are_refused(first):
    with pytest.raises(InputError, match="different ones of 0 to 3"):
        Front.from_first(torch.tensor(first), 4)
