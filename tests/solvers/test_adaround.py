import pytest
import torch

from fewbits.solvers.adaround import annealed_power, rounding_penalty, soft_rounding, start_logits


def test_training_starts_at_the_fraction_itself():
    fraction = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(soft_rounding(start_logits(fraction)), fraction, rtol=1e-5, atol=1e-5)


def test_the_penalty_is_zero_for_decided_choices_alone():
    assert float(rounding_penalty(torch.tensor([0.0, 1.0, 1.0]), 2.0)) == 0
    assert float(rounding_penalty(torch.tensor([0.5]), 20.0)) == 1
    # A high power leaves the middle alone: its slope at 0.6 is far below that of a low one.
    slopes = []
    for power in (20.0, 2.0):
        soft = torch.tensor([0.6], requires_grad=True)
        slopes.append(float(torch.autograd.grad(rounding_penalty(soft, power), soft)[0].abs()))
    assert slopes[0] < 1e-6 < slopes[1]


def test_the_power_falls_after_the_warm_up():
    assert annealed_power(0.1) is None and annealed_power(0.2) == pytest.approx(20) and annealed_power(1.0) == pytest.approx(2)
    powers = [annealed_power(p / 10) for p in range(2, 11)]
    assert powers == sorted(powers, reverse=True)
