import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.solvers.two_level import fit_range, fit_second_level, round_with


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 8), st.integers(1, 17))
@settings(max_examples=40, deadline=None)
def test_values_are_within_half_a_step_of_their_run(seed, rows, bits, size):
    values = torch.randn(rows, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    level = fit_second_level(values, bits, size)
    assert len(level.scales) == -(-rows // size) and int(level.codes.max()) < 2**bits
    for run, part in enumerate(values.split(size)):
        step = float(level.scales[run].float())
        error = (level.values[run * size : run * size + len(part)] - part).abs().max()
        assert float(error) <= 0.5 * step + 2e-2 * float(part.abs().max())


def test_what_is_stored_is_what_was_returned():
    values = torch.rand(37, generator=torch.Generator().manual_seed(0)) + 0.1
    level = fit_second_level(values, 3, 16)
    run = torch.arange(37) // 16
    again = (level.codes.float() - level.zeros.float()[run]) * level.scales.float()[run]
    assert torch.equal(again, level.values)


def test_a_run_of_equal_values_keeps_them():
    for value in (0.0123, 7.0, -2.5, 0.0):
        level = fit_second_level(torch.full((16,), value), 3, 16)
        torch.testing.assert_close(level.values, torch.full((16,), value), rtol=2e-3, atol=1e-6)


def test_ranges_need_not_hold_zero_and_flat_rows_get_one():
    weight = torch.tensor([[2.0, 3.0, 4.0], [5.0, 5.0, 5.0]])
    scale, zero = fit_range(weight, 2)
    assert torch.allclose(scale, torch.tensor([2 / 3, 2 / 3])) and torch.allclose(zero, torch.tensor([-3.0, -6.0]))
    codes = round_with(weight, scale[:, None], zero[:, None], 2)
    assert codes[0].tolist() == [0, 2, 3] or codes[0].tolist() == [0, 1, 3]


def test_weights_that_do_not_count_move_no_range():
    weight = torch.tensor([[0.0, 1.0, 100.0]])
    keep = torch.tensor([[True, True, False]])
    assert torch.equal(torch.stack(fit_range(weight, 3, keep)), torch.stack(fit_range(torch.tensor([[0.0, 1.0]]), 3)))
    assert torch.isfinite(fit_range(weight, 3, torch.zeros_like(keep))[0]).all()
