import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.methods.weights.hqq import Hqq
from fewbits.methods.weights.rtn import Rtn


def heavy(rows=32, columns=256, seed=0):
    """Student's t with five degrees of freedom, as weights of language models are."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.randn(rows, columns, 5, generator=generator).square().mean(-1)
    return torch.randn(rows, columns, generator=generator) / squares.sqrt()


def loss(weight, tensor, norm=0.7):
    return float((weight - tensor.decode()).abs().pow(norm).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_norm_that_is_minimized_falls_below_round_to_nearest(bits):
    weight = heavy()
    ours = Hqq(bits=bits).compress(weight, Statistics())
    assert loss(weight, ours) < (1.0 if bits == 2 else 0.97) * loss(weight, Rtn(bits=bits, group_size=64).compress(weight, Statistics()))
    start = Hqq(bits=bits, iterations=0).compress(weight, Statistics())
    assert loss(weight, ours) < 0.985 * loss(weight, start)
    assert sum(ours.bits().values()) == 32 * 256 * bits + 2 * 16 * 32 * 4


def test_one_step_by_hand():
    """w = [0, 1, 2, 4] at 2 bits: scale 4/3, zero 0; codes 0, 1, 2, 3 (2 / (4/3) = 1.5 goes to even), errors 0, -1/3, -2/3, 0."""
    weight = torch.tensor([[0.0, 1.0, 2.0, 4.0]])
    scale = torch.tensor(4 / 3).half().item()
    error = torch.tensor([0.0, 1 - scale, 2 - 2 * scale, 4 - 3 * scale])
    kept = error.sign() * (error.abs() - error.abs().clamp(min=1e-12).pow(-0.3) / 10).clamp(min=0)
    expected = (torch.tensor([0.0, 1.0, 2.0, 3.0]) - (weight[0] - kept) / scale).mean()
    stepped = Hqq(bits=2, group_size=None, iterations=1).compress(weight, Statistics())
    start = Hqq(bits=2, group_size=None, iterations=0).compress(weight, Statistics())
    zero = stepped.terms[0].zero_points.item()
    assert start.terms[0].zero_points.item() == 0
    assert zero in (0.0, pytest.approx(expected.item(), abs=2e-3))
    assert loss(weight, stepped, 1.0) <= loss(weight, start, 1.0) + 1e-3


def test_rows_of_one_value_are_kept():
    weight = torch.tensor([[0.0] * 8, [3.0] * 8, [-2.0] * 8])
    torch.testing.assert_close(Hqq(bits=2, group_size=8).compress(weight, Statistics()).decode(), weight, rtol=1e-3, atol=1e-3)


def test_values_out_of_range_are_named():
    with pytest.raises(InputError, match="norm=2"):
        Hqq(norm=2)
