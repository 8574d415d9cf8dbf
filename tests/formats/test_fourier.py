import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, from_stored
from fewbits.formats.dense import Dense
from fewbits.formats.fourier import RealFourier


@pytest.mark.parametrize("size", [1, 2, 3, 8, 24, 31])
def test_spectra_are_those_of_the_definition(size):
    """Against the sum of exponentials, in double precision: real parts of frequency 0 on, then imaginary ones that have a conjugate."""
    vectors = torch.randn(4, 3 + 2 * size, generator=torch.Generator().manual_seed(size))
    place = torch.arange(size, dtype=torch.float64)
    waves = torch.exp(-2j * torch.pi * place[:, None] * place / size) / size**0.5
    expected = [vectors[:, :3].double()]
    for block in vectors[:, 3:].double().split(size, 1):
        spectrum = block.to(torch.complex128) @ waves
        weights = torch.tensor([1.0 if 2 * f % size == 0 else 2**0.5 for f in range(size)], dtype=torch.float64)
        paired = (size - 1) // 2
        expected += [(spectrum.real * weights)[:, : size // 2 + 1], (spectrum.imag * weights)[:, 1 : paired + 1]]
    found = RealFourier(size, 3).apply(vectors)
    assert found.shape == vectors.shape
    torch.testing.assert_close(found, torch.cat(expected, 1).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_its_inverse_is_its_transpose(size):
    transform = RealFourier(size, 4)
    matrix = transform.apply(torch.eye(4 + 3 * size)).T
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(4 + 3 * size), rtol=0, atol=1e-5)
    torch.testing.assert_close(transform.transpose().apply(torch.eye(4 + 3 * size)).T, matrix.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(transform.inverse().apply(transform.apply(matrix)), matrix, rtol=0, atol=1e-5)
    again = from_stored(transform.settings(), transform.tensors())
    assert torch.equal(again.apply(matrix), transform.apply(matrix))


def test_around_a_term_in_half_precision_and_by_inputs():
    weight, transform = torch.randn(5, 16), RealFourier(8)
    tensor = CompressedTensor((Dense(transform.apply(weight)),), (transform,))
    torch.testing.assert_close(tensor.decode(), weight, rtol=1e-5, atol=1e-5)
    inputs = torch.randn(3, 16)
    torch.testing.assert_close(tensor.matmul(inputs), inputs @ weight.T, rtol=1e-4, atol=1e-4)
    assert transform.apply(weight.half()).dtype == torch.float16


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="spectra of 0"):
        RealFourier(0)
    for features in (13, 3):
        with pytest.raises(InputError, match="cannot be cut into spectra of 4"):
            RealFourier(4, 8).apply(torch.ones(1, features))
