from itertools import pairwise

import numpy as np
import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.solvers.kmeans import cluster_pools, cluster_rows, clustering_error, nearest_level
from fewbits.solvers.row_groups import group_levels, group_rows, row_features, scaled_levels

COUNTS = (2, 4, 8, 16, 32)


def layer(size=512, seed=0):
    """Noise and a part of rank 16."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, size, generator=generator)
    low = torch.randn(size, 16, generator=generator) @ torch.randn(16, size, generator=generator)
    return 0.02 * noise + 0.004 * low, torch.exp(torch.randn(size, 1, generator=generator))


def error(weight, groups, count=16, scaled=False):
    placed = weight[groups.order]
    if scaled:
        levels, scales = scaled_levels(weight, groups, count)
        levels = levels * scales.float()[groups.of_place][:, None]
    else:
        levels = group_levels(weight, groups, count)[groups.of_place]
    return float(clustering_error(placed, torch.ones_like(placed), levels).sum() / placed.square().sum())


@pytest.mark.slow
def test_sorted_rows_share_codebooks_better_than_rows_as_they_come():
    alike, factors = layer()
    weight, last = alike * factors, error(alike * factors, group_rows(alike, 1))
    for count in COUNTS:
        ours, unsorted = (error(weight, group_rows(weight, count, kind)) for kind in ("sorted", "unsorted"))
        assert ours < 0.98 * unsorted and ours < last and 16 * 16 * count / weight.numel() <= 0.03125
        last = ours
    assert last < 0.5 * error(weight, group_rows(weight, 1))
    # Rows of one distribution have nothing to gain.
    assert error(alike, group_rows(alike, 8)) > 0.95 * error(alike, group_rows(alike, 1))


@pytest.mark.slow
def test_no_start_from_quantiles_is_better():
    weight = (layer(256)[0] * layer(256)[1]).flatten()
    values = weight.double().numpy()
    levels = np.quantile(values, (np.arange(16) + 0.5) / 16)
    errors = []
    for _ in range(100):
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
        errors.append(((values - levels[codes]) ** 2).sum())
        levels = np.bincount(codes, values, 16) / np.bincount(codes, minlength=16)
    assert errors == sorted(errors, reverse=True)
    found = cluster_pools([(weight, torch.ones_like(weight))], 16)
    assert float(clustering_error(weight[None], torch.ones_like(weight)[None], found)) <= errors[-1]


def test_lloyds_iteration_never_rises():
    values = layer(32)[0].flatten()[None]
    weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(0))
    errors = [float(clustering_error(values, weights, cluster_rows(values, weights, 8, iterations=count))) for count in range(12)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(errors)) and errors[-1] < errors[0]


def test_as_many_levels_as_values_lose_nothing_in_every_pool():
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(7, generator=generator)
    pools = [few[torch.randint(7, (300,), generator=generator)], torch.randn(300, generator=generator), torch.zeros(0)]
    levels = cluster_pools([(one, torch.ones_like(one)) for one in pools], 8)
    assert torch.equal(levels[0].unique(), few.sort().values) and bool((levels.diff(dim=1) >= 0).all())
    assert levels.shape == (3, 8) and not bool(levels[2].any())
    alone = cluster_rows(pools[1][None].sort().values, torch.ones(1, 300), 8, bins=128)
    torch.testing.assert_close(levels[1], alone[0])


def test_one_codebook_for_scaled_rows_needs_errors_weighed_by_the_scales():
    weight = layer(128)[0] * layer(128)[1]
    groups = group_rows(weight, 128)
    levels, scales = scaled_levels(weight, groups, 16)
    each = scales.float()[groups.of_place][:, None]
    plain = cluster_pools([((weight / each).flatten(), torch.ones(weight.numel()))], 16)
    weighted, unweighted = (
        float((weight - each * one.expand(128, -1).gather(1, nearest_level(weight / each, one.expand(128, -1)).long())).square().sum())
        for one in (levels, plain)
    )
    assert weighted < unweighted


def test_features_do_not_see_the_order_of_entries_and_runs_are_told_by_them():
    weight = layer(64)[0] * layer(64)[1]
    torch.testing.assert_close(row_features(weight), row_features(weight.flip(1)))
    for kind in ("sorted", "clustered", "unsorted"):
        groups = group_rows(weight, 5, kind)
        assert torch.equal(groups.order.sort().values, torch.arange(64)) and int(groups.ends[-1]) == 64
        assert [len(one) for one in groups.ranges] == torch.bincount(groups.of_place, minlength=5).tolist()
        inside = [groups.order[one.start : one.stop] for one in groups.ranges]
        assert all(torch.equal(one, one.sort().values) for one in inside)  # within a run rows keep their order
        again = group_rows(weight.flip(1), 5, kind)
        assert torch.equal(again.order, groups.order) and torch.equal(again.ends, groups.ends)
    deviation = weight.std(1)[group_rows(weight, 4).order].view(4, 16)
    assert bool((deviation.amax(1)[:-1] <= deviation.amin(1)[1:] * 1.01).all())
    assert torch.equal(group_rows(weight, 1000).order, torch.arange(64))
    for count, kind in ((0, "sorted"), (2, "shuffled")):
        with pytest.raises(InputError, match="would be right"):
            group_rows(weight, count, kind)
