import torch

from fewbits.layers.straight_through import round_through, sign_through, straight_through

VALUES = [-3.0, -0.5, -0.0, 0.0, 0.4, 2.5]


def passed(step):
    values = torch.tensor(VALUES, requires_grad=True)
    made = step(values)
    (made * torch.arange(1.0, 7.0)).sum().backward()
    return made.detach().tolist(), values.grad.tolist()


def test_signs_have_two_levels_and_pass_every_gradient():
    assert passed(sign_through) == ([-1, -1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6])


def test_a_window_stops_what_lies_outside():
    assert passed(lambda values: sign_through(values, window=1.0)) == ([-1, -1, 1, 1, 1, 1], [0, 2, 3, 4, 5, 0])


def test_rounding_is_exact_and_passes_every_gradient():
    assert passed(round_through) == ([-3, 0, 0, 0, 0, 2], [1, 2, 3, 4, 5, 6])


def test_the_replacement_comes_out_bit_for_bit():
    """values + (replacement - values) would not: the difference is rounded."""
    values = torch.full((3,), 1e8, requires_grad=True)
    replacement = torch.tensor([0.1, 1.0, -2.3], requires_grad=True)
    made = straight_through(values, replacement)
    made.sum().backward()
    assert torch.equal(made, replacement) and values.grad.tolist() == [1, 1, 1] and replacement.grad is None
