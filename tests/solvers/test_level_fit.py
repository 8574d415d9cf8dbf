import torch

from fewbits.solvers.kmeans import clustering_error, exact_levels
from fewbits.solvers.level_fit import fit_levels, matched_levels


def drawn(count=1500):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, generator=generator).clamp(-2.5, 2.5) / 2.5
    return values, torch.rand(count, generator=generator) ** 4


def test_levels_are_near_the_exact_solution():
    values, weights = drawn()
    ordered, order = values.double().sort()
    best, found = exact_levels(ordered[None], weights.double()[order][None], 4), fit_levels(values, weights, 4)[None]
    errors = [float(clustering_error(values.double()[None], weights.double()[None], one.double())) for one in (best, found)]
    assert errors[1] <= 1.02 * errors[0]


def test_weight_draws_levels_and_none_counts_all_alike():
    values = torch.tensor([-1.0, -0.5, 0.5, 1.0])
    assert fit_levels(values, torch.tensor([1.0, 0.0, 0.0, 3.0]), 2).tolist() == [-1.0, 1.0]
    assert fit_levels(values, torch.tensor([1.0, 1.0, 1.0, 3.0]), 2).tolist() == [-0.75, 0.875]
    assert fit_levels(values, torch.zeros(4), 2).tolist() == [-0.75, 0.75]


def test_matched_levels_by_hand():
    values, levels = torch.tensor([-1.0, 0.0, 2.0, 3.0]), torch.tensor([-0.5, 1.5])
    found = matched_levels(levels, values, torch.tensor([1.0]))
    # coded: two of each level, mean .5 and spread 1; the values have mean 1 and spread sqrt(2.5)
    torch.testing.assert_close(found, torch.tensor([1 - 2.5**0.5, 1 + 2.5**0.5]))
    assert torch.equal(matched_levels(levels, values[:2], torch.tensor([1.0])), levels)
