import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.solvers.power_iteration import power_factors


def matrices(count=4, rows=64, columns=16):
    """Residuals with a decaying spectrum: a coherent part and noise."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(count, size, 4, generator=generator) for size in (rows, columns))
    return left @ (torch.tensor([2.0, 1.5, 1.0, 0.7])[:, None] * right.transpose(1, 2)) + torch.randn(
        count, rows, columns, generator=generator
    )


def test_three_rounds_are_within_six_hundredths_of_the_best():
    given = matrices()
    left, right = power_factors(given, 4)
    best = torch.linalg.svdvals(given)[:, 4:].square().sum(1).sqrt()
    assert bool(((given - left @ right).flatten(1).norm(dim=1) <= 1.06 * best).all())
    once = power_factors(given, 4, rounds=1)
    assert (given - once[0] @ once[1]).norm() > (given - left @ right).norm()


def test_a_full_rank_is_exact_and_a_larger_one_is_cut():
    given = matrices(columns=8)
    left, right = power_factors(given, 30)
    assert left.shape == (4, 64, 8)
    torch.testing.assert_close(left @ right, given, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left.transpose(1, 2) @ left, torch.eye(8).expand(4, 8, 8), rtol=0, atol=1e-5)


def test_each_matrix_has_its_own_factors():
    given = matrices()
    alone = power_factors(given[1:2], 3)
    together = power_factors(given, 3)
    torch.testing.assert_close(alone[0][0] @ alone[1][0], together[0][1] @ together[1][1], rtol=1e-4, atol=1e-4)


def test_wrong_sizes():
    with pytest.raises(InputError, match="rank=0"):
        power_factors(matrices(), 0)
