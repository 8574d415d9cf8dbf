import pytest
import torch

from fewbits.core.errors import InputError, NumericsError
from fewbits.solvers.ridge import ridge


def problem(features=12, size=30, targets=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, size, generator=generator, dtype=torch.float64) for n in (features, targets))
    return left, right


def test_the_gradient_vanishes_and_every_step_away_costs():
    left, right = problem()
    found = ridge(left @ left.T, left @ right.T, 0.3).requires_grad_()

    def loss(answer):
        return (right - answer.T @ left).square().sum() + 0.3 * answer.square().sum()

    (gradient,) = torch.autograd.grad(loss(found), found)
    assert float(gradient.abs().max()) < 1e-6
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        assert loss(found + 0.01 * torch.randn(found.shape, generator=generator, dtype=torch.float64)) > loss(found)


def test_a_batch_is_solved_entry_by_entry_in_float64():
    pairs = [problem(seed=seed) for seed in range(3)]
    gram = torch.stack([left @ left.T for left, _ in pairs])
    cross = torch.stack([left @ right.T for left, right in pairs])
    whole = ridge(gram.float(), cross.float(), 0.1)
    assert whole.dtype == torch.float64
    for index, (left, right) in enumerate(pairs):
        torch.testing.assert_close(whole[index], ridge(left @ left.T, left @ right.T, 0.1), atol=1e-5, rtol=1e-4)


def test_more_features_than_their_size_need_a_penalty():
    left, right = problem(features=40)
    for seed in range(5):
        left, right = problem(features=40, seed=seed)
        with pytest.raises(NumericsError, match="linearly dependent"):
            ridge(left @ left.T, left @ right.T, 0.0)
    assert torch.isfinite(ridge(left @ left.T, left @ right.T, 1e-3)).all()


def test_a_tiny_penalty_lets_the_answer_grow():
    left, right = problem(features=30)
    sizes = [float(ridge(left @ left.T, left @ right.T, penalty).norm()) for penalty in (1e-9, 1.0)]
    assert sizes[0] > 3 * sizes[1]


def test_bad_input_is_named():
    with pytest.raises(InputError, match="do not fit"):
        ridge(torch.eye(3), torch.ones(2, 2), 1.0)
    with pytest.raises(InputError, match="penalty=-1"):
        ridge(torch.eye(3), torch.ones(3, 2), -1.0)
