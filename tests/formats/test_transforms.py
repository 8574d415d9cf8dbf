import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, from_stored
from fewbits.formats.diagonal import DiagonalScale
from fewbits.formats.permutation import Permutation
from fewbits.formats.rotation import Hadamard
from fewbits.formats.uniform import Uniform

TRANSFORMS = [DiagonalScale(torch.tensor([0.5, -2.0, 4.0, 0.25])), Permutation(torch.tensor([2, 0, 3, 1], dtype=torch.int32))]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.kind)
def test_inverse_and_transpose_are_those_of_its_matrix(transform):
    matrix = transform.apply(torch.eye(4)).T  # apply maps rows, so its columns are T e_i
    assert torch.equal(transform.transpose().apply(torch.eye(4)).T, matrix.T)
    torch.testing.assert_close(transform.inverse().apply(torch.eye(4)).T, torch.linalg.inv(matrix))
    again = from_stored(transform.settings(), transform.tensors())
    assert torch.equal(again.apply(torch.eye(4)), transform.apply(torch.eye(4)))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 6), columns=st.sampled_from([1, 2, 12, 20, 24, 28, 32]), seed=st.integers(0, 999), count=st.integers(0, 3))
def test_any_transforms_around_a_term_are_a_product_of_matrices(rows, columns, seed, count):
    torch.manual_seed(seed)
    kinds = [
        lambda: Permutation(torch.randperm(columns).int()),
        lambda: DiagonalScale(torch.rand(columns) + 0.5),
        lambda: Hadamard.random(columns, torch.Generator().manual_seed(seed)),
    ]
    chosen = tuple(kinds[int(torch.randint(3, ()))]() for _ in range(count))
    term = Uniform.from_codes(torch.randint(16, (rows, columns)), torch.rand(rows, 1), None, bits=4)
    tensor = CompressedTensor((term,), chosen)
    whole = torch.eye(columns)
    for transform in chosen:
        matrix = transform.apply(torch.eye(columns)).T
        torch.testing.assert_close(transform.inverse().apply(transform.apply(torch.eye(columns))), torch.eye(columns), rtol=0, atol=1e-5)
        torch.testing.assert_close(transform.transpose().apply(torch.eye(columns)).T, matrix.T, rtol=0, atol=1e-6)
        whole = matrix @ whole
    torch.testing.assert_close(tensor.decode(), term.decode() @ whole, rtol=1e-4, atol=1e-4)
    inputs = torch.randn(3, columns)
    torch.testing.assert_close(tensor.matmul(inputs), inputs @ tensor.decode().T, rtol=1e-4, atol=1e-4)
    again = from_stored(tensor.settings(), load(save({name: value.contiguous() for name, value in tensor.tensors().items()})))
    assert torch.equal(again.decode(), tensor.decode())


def test_transforms_around_terms_compose_in_their_order():
    torch.manual_seed(0)
    term = Uniform.from_codes(torch.randint(16, (4, 4)), torch.rand(4, 1), None, bits=4)
    tensor = CompressedTensor((term,), tuple(TRANSFORMS), tuple(reversed(TRANSFORMS)))
    inputs = torch.randn(5, 4)
    torch.testing.assert_close(tensor.matmul(inputs), inputs @ tensor.decode().T, rtol=1e-4, atol=1e-4)
    assert sum(tensor.bits().values()) == sum(term.bits().values()) + 2 * (4 * 32 + 4 * 32)


def test_what_is_not_invertible_is_refused():
    with pytest.raises(InputError, match="other than zero"):
        DiagonalScale(torch.tensor([1.0, 0.0]))
    with pytest.raises(InputError, match="each of 0 to 2 once"):
        Permutation(torch.tensor([0, 0, 1]))
