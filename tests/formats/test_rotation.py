import pytest
import torch
from scipy.linalg import hadamard

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.formats.rotation import Hadamard, paley_matrix


@pytest.mark.parametrize("order", [12, 20, 28])
def test_paley_matrices_are_signs_with_orthogonal_rows(order):
    matrix = paley_matrix(order)
    assert bool((matrix.abs() == 1).all()) and torch.equal(matrix @ matrix.T, order * torch.eye(order))


@pytest.mark.parametrize("size", [1, 2, 64, 12, 24, 40, 56, 448])
@pytest.mark.parametrize("signed", [False, True])
def test_a_rotation_keeps_lengths_and_its_transpose_undoes_it(size, signed):
    rotation = Hadamard.random(size, torch.Generator().manual_seed(0)) if signed else Hadamard(size)
    matrix = rotation.apply(torch.eye(size)).T
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=0, atol=1e-5)
    torch.testing.assert_close(rotation.transpose().apply(torch.eye(size)).T, matrix.T, rtol=0, atol=1e-6)
    vectors = torch.randn(3, 2, size)
    torch.testing.assert_close(rotation.inverse().apply(rotation.apply(vectors)), vectors)
    again = from_stored(rotation.settings(), rotation.tensors())
    assert torch.equal(again.apply(vectors), rotation.apply(vectors))
    assert sum(rotation.bits().values()) == (8 * -(-size // 8) if signed else 0)


def test_powers_of_two_are_sylvesters_matrix():
    expected = torch.from_numpy(hadamard(32)).float() / 32**0.5
    torch.testing.assert_close(Hadamard(32).apply(torch.eye(32)), expected)


def test_an_outlier_is_spread_evenly():
    spike = torch.zeros(96)
    spike[5] = 1.0
    assert Hadamard(96).apply(spike).abs().max() == pytest.approx(96**-0.5)


def test_sizes_that_are_not_built_are_named():
    with pytest.raises(InputError, match="size 36"):
        Hadamard(36)
    with pytest.raises(InputError, match="cannot be rotated"):
        Hadamard(8).apply(torch.zeros(7))
