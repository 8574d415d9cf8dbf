import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.core.errors import InputError
from fewbits.kernels import native
from fewbits.solvers.kmeans import best_edges, cluster_rows, clustering_error, exact_levels, nearest_level


def rows(count, columns, seed=0, power=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=generator), torch.rand(count, columns, generator=generator).pow(power)


def least(values, weights, count):
    """The plain dynamic programme over all intervals of one row's sorted values."""
    values, weights, size = values.double().numpy(), weights.double().numpy(), len(values)
    cost = np.full((size + 1, size + 1), np.inf)
    for start in range(size):
        for end in range(start + 1, size + 1):
            mass = weights[start:end]
            mean = (mass * values[start:end]).sum() / mass.sum() if mass.sum() else 0.0
            cost[start, end] = (mass * (values[start:end] - mean) ** 2).sum()
    best = cost[0].copy()
    for _ in range(count - 1):
        best = np.array([min([best[end], *(best[start] + cost[start, end] for start in range(end))]) for end in range(size + 1)])
    return float(best[size])


def ordered(values, weights):
    values, order = values.sort(dim=1)
    return values, weights.gather(1, order)


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(2, 30), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_path_is_the_best_clustering(seed, count, columns, ties):
    values, weights = ordered(*rows(3, columns, seed))
    values = (values * 2).round() if ties else values
    levels = exact_levels(values, weights, count)
    assert levels.shape == (3, count) and bool((levels.diff(dim=1) >= 0).all())
    for row in range(3):
        found = float(clustering_error(values[row : row + 1], weights[row : row + 1], levels[row : row + 1]))
        assert found == pytest.approx(least(values[row], weights[row], count), rel=1e-6, abs=1e-12)


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 70), st.booleans())
@settings(max_examples=40, deadline=None)
@pytest.mark.skipif(native.chosen() is None, reason="the native kernels are not built")
def test_the_native_path_ends_in_the_edges_of_the_definition(seed, count, columns, ties):
    values, weights = ordered(*rows(40, columns, seed))
    values, weights = ((values * 2).round(), weights.round()) if ties else (values, weights)
    sums = [torch.cat([torch.zeros(40, 1).double(), (weights * values**power).double().cumsum(1)], 1) for power in range(3)]
    count = min(count, columns)
    assert native.best_edges(sums, count).tolist() == best_edges(*(one.numpy() for one in sums), count).tolist()


def test_merged_runs_lose_next_to_nothing():
    values, weights = rows(16, 600)
    levels, best = cluster_rows(values, weights, 8), exact_levels(*ordered(values, weights), 8)
    gap = clustering_error(values, weights, levels) / clustering_error(values, weights, best)
    assert float(gap.max()) < 1.01 and float(gap.median()) < 1.001


def test_values_without_weight_change_no_level():
    values, weights = rows(4, 600)
    weights[:, ::50] = 0
    moved = values.clone()
    moved[:, ::50] *= 3
    assert torch.equal(cluster_rows(moved, weights, 8), cluster_rows(values, weights, 8))


def test_values_far_out_get_runs_of_their_own():
    """Student t with 3 degrees of freedom: merged with its neighbours the largest value would hide that it needs a level."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, 1000, generator=generator) / torch.randn(3, 8, 1000, generator=generator).square().mean(0).sqrt()
    weights = torch.randn(8, 1000, generator=generator).square()
    levels, best = cluster_rows(values, weights, 8), exact_levels(*ordered(values, weights), 8)
    gap = clustering_error(values, weights, levels) / clustering_error(values, weights, best.float())
    assert float(gap.max()) < 1.02 and float(gap.median()) < 1.002


def test_no_random_start_of_lloyds_iteration_is_better():
    values, weights = rows(8, 256, power=8)
    ours = clustering_error(values, weights, cluster_rows(values, weights, 8))
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        start = values.gather(1, torch.rand(8, 256, generator=generator).argsort(dim=1)[:, :8]).sort(dim=1).values
        for _ in range(50):
            hot = torch.nn.functional.one_hot(nearest_level(values, start).long(), 8).float() * weights[:, :, None]
            mass = hot.sum(1)
            start = torch.where(mass > 0, (hot * values[:, :, None]).sum(1) / mass.clamp(min=1e-30), start).sort(dim=1).values
        assert bool((ours <= clustering_error(values, weights, start) * (1 + 1e-6)).all())


def test_weights_matter_and_weightless_values_do_not_move_a_level():
    values = torch.tensor([[0.0, 1.0, 10.0, 11.0]])
    assert cluster_rows(values, torch.tensor([[1.0, 1.0, 1.0, 3.0]]), 2).tolist() == [[0.5, 10.75]]
    assert cluster_rows(values, torch.tensor([[1.0, 1.0, 0.0, 3.0]]), 2).tolist()[0][1] == 11.0
    assert cluster_rows(values, torch.zeros(1, 4), 2).tolist() == [[0.5, 10.5]]


def test_fewer_values_than_levels_are_met_exactly():
    values = torch.tensor([[2.0, 2.0, -1.0], [5.0, 5.0, 5.0]])
    levels = cluster_rows(values, torch.ones(2, 3), 4)
    assert float(clustering_error(values, torch.ones(2, 3), levels).sum()) == 0


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match="do not fit"):
        cluster_rows(torch.zeros(2, 3), torch.zeros(2, 4), 2)
    with pytest.raises(InputError, match="negative"):
        cluster_rows(torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), 2)
