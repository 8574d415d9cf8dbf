"""The first check of NUPES's proof, and what every term promises."""

import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.formats.power import Power, largest_code, power_codes, power_map
from fewbits.formats.uniform import Uniform

EXPONENTS = [0.2, 0.35, 0.5, 0.77, 1.0, 1.2]


def weight(rows=16, columns=64):
    return torch.distributions.StudentT(5.0).sample((rows, columns))


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_the_map_of_a_product_is_the_product_of_the_maps(exponent):
    x, y = torch.randn(2, 1000, dtype=torch.float64)
    torch.testing.assert_close(power_map(x * y, exponent), power_map(x, exponent) * power_map(y, exponent), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_exponent_of_one_is_the_symmetric_uniform_grid_bit_for_bit(bits):
    torch.manual_seed(0)
    values, most = weight(), largest_code(bits)
    power = Power.nearest(values, 1.0, bits=bits)
    maxima = values.abs().amax(1, keepdim=True).half().float()
    codes = torch.round(most * (values / maxima)).clamp(-most, most)
    uniform = Uniform.from_codes((codes + 2 ** (bits - 1)).to(torch.uint8), maxima / most, None, bits=bits)
    assert torch.equal(power.unpacked_codes().float(), codes)
    assert torch.equal(power.decode(), uniform.decode())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_every_code_comes_back_from_its_value(bits, exponent):
    most = largest_code(bits)
    codes = torch.arange(-most, most + 1)[None].expand(3, -1)
    maxima = torch.tensor([[0.03], [1.0], [700.0]]).half()
    term = Power.from_codes(codes, maxima, exponent, bits=bits)
    values = term.decode()
    assert torch.equal(power_codes(values, maxima.float(), term.exponent, bits), codes.float())
    assert torch.equal(Power.nearest(values, exponent, bits=bits).unpacked_codes().long(), codes)
    assert bool((values.diff() > 0).all()) and bool((values[:, most] == 0).all())


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_the_table_is_the_formula(exponent):
    torch.manual_seed(0)
    term = Power.nearest(weight(), exponent, bits=4)
    formula = term.maxima.float() * power_map(term.unpacked_codes().float() / 7, 1 / term.exponent)
    torch.testing.assert_close(term.decode(), formula, rtol=1e-5, atol=0)
    assert term.levels().shape == (15,) and torch.equal(term.levels(), -term.levels().flip(0))


def test_a_smaller_exponent_puts_more_levels_near_zero():
    near = [int((Power.nearest(torch.ones(1, 1), a, bits=4).levels().abs() < 7 / 2).sum()) for a in (0.3, 0.6, 1.0)]
    assert near[0] > near[1] > near[2]


def test_what_is_stored_and_read_back():
    torch.manual_seed(0)
    term = Power.nearest(weight(16, 64), 0.6, bits=3)
    assert term.bits() == {"codes": 16 * 64 * 3, "maxima": 16 * 16, "exponent": 32}
    again = from_stored(term.settings(), term.tensors())
    assert torch.equal(again.decode(), term.decode())
    inputs = torch.randn(2, 64)
    torch.testing.assert_close(term.matmul(inputs), inputs @ term.decode().T)


def test_rows_of_zeros_stay_zero():
    values = torch.zeros(2, 8)
    values[1, 3] = -2.0
    assert torch.equal(Power.nearest(values, 0.5, bits=4).decode(), values)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="bits=1"):
        Power.nearest(torch.ones(1, 2), 0.5, bits=1)
    with pytest.raises(InputError, match=r"exponent=0\.0"):
        Power.nearest(torch.ones(1, 2), 0.0, bits=4)
    with pytest.raises(InputError, match=r"not finite in torch\.float16"):
        Power.nearest(torch.full((1, 2), 1e6), 0.5, bits=4)
    with pytest.raises(InputError, match="a code of 8 is out of range"):
        Power.from_codes(torch.tensor([[8]]), torch.ones(1, 1), 0.5, bits=4)
    with pytest.raises(InputError, match=r"maxima \[2, 1\] do not fit"):
        Power.from_codes(torch.tensor([[1]]), torch.ones(2, 1), 0.5, bits=4)
