import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.solvers.low_rank import low_rank

MATRIX = torch.randn(24, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_error_is_the_tail_of_the_singular_values():
    sizes = torch.linalg.svdvals(MATRIX)
    for rank in (1, 5, 24):
        left, right = low_rank(MATRIX, rank)
        assert left.shape == (24, rank) and right.shape == (rank, 40)
        assert float((MATRIX - left @ right).square().sum()) == pytest.approx(float(sizes[rank:].square().sum()), abs=1e-9)
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


def test_weights_are_optimal_where_no_small_change_helps():
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.rand(24, generator=generator).double() + 0.1, torch.rand(40, generator=generator).double() + 0.1
    left, right = (one.requires_grad_(True) for one in low_rank(MATRIX, 4, row_weights=rows, column_weights=columns))
    lost = (rows[:, None] * (MATRIX - left @ right) * columns).square().sum()
    lost.backward()
    assert float(left.grad.abs().max()) < 1e-9 and float(right.grad.abs().max()) < 1e-9
    plain = low_rank(MATRIX, 4)
    assert float(lost.detach()) < 0.99 * float((rows[:, None] * (MATRIX - plain[0] @ plain[1]) * columns).square().sum())


def test_equal_weights_change_nothing_and_zeros_do_not_break_it():
    plain = low_rank(MATRIX, 3)
    same = low_rank(MATRIX, 3, row_weights=torch.full((24,), 7.0), column_weights=torch.full((40,), 0.01))
    torch.testing.assert_close(plain[0] @ plain[1], same[0] @ same[1])
    dead = torch.ones(40)
    dead[:5] = 0
    left, right = low_rank(MATRIX, 24, column_weights=dead)
    torch.testing.assert_close((left @ right)[:, 5:], MATRIX[:, 5:])
    assert bool(torch.isfinite(right).all())


def test_random_projections_find_nearly_as_much_and_leave_the_generator_alone():
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(200, 30, generator=generator) @ torch.diag(0.8 ** torch.arange(30.0)) @ torch.randn(30, 160, generator=generator)
    before = torch.get_rng_state()
    exact, random = ((matrix - left @ right).norm() for left, right in (low_rank(matrix, 8), low_rank(matrix, 8, seed=0)))
    assert torch.equal(before, torch.get_rng_state())
    assert float(exact) <= float(random) < 1.01 * float(exact)


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match="rank=25"):
        low_rank(MATRIX, 25)
    with pytest.raises(InputError, match="40 numbers"):
        low_rank(MATRIX, 2, column_weights=torch.ones(3))
