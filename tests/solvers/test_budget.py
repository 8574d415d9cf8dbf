from itertools import product

import numpy as np
import pytest

from fewbits.core.errors import InputError
from fewbits.solvers.budget import affordable_rank, choose


def problem(seed, layers=3, configurations=5):
    random = np.random.default_rng(seed)
    sizes = np.sort(random.uniform(1, 9, (layers, configurations)), axis=1)
    return random.exponential(1, (layers, configurations)) * np.exp(-sizes / 2), sizes


def total(table, choices):
    return sum(row[choice] for row, choice in zip(table, choices, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_it_equals_brute_force(seed):
    costs, sizes = problem(seed)
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        budget = sizes.min(1).sum() * (1 - share) + sizes.max(1).sum() * share
        best = min(total(costs, every) for every in product(range(5), repeat=3) if total(sizes, every) <= budget)
        found = choose(costs.tolist(), sizes.tolist(), budget)
        assert total(sizes, found) <= budget * (1 + 1e-12)
        assert total(costs, found) == pytest.approx(best, rel=1e-7)


def test_more_budget_never_costs_more_and_no_uniform_choice_is_better():
    costs, sizes = problem(7, layers=56, configurations=12)
    spent, before = [], np.inf
    for budget in np.linspace(sizes.min(1).sum(), sizes.max(1).sum(), 9):
        found = choose(costs.tolist(), sizes.tolist(), budget)
        cost = total(costs, found)
        spent.append(total(sizes, found))
        assert spent[-1] <= budget * (1 + 1e-12) and cost <= before * (1 + 1e-9)
        uniform = [costs[:, one].sum() for one in range(12) if sizes[:, one].sum() <= budget]
        assert cost <= min(uniform, default=np.inf) * (1 + 1e-9)
        before = cost


def test_numbers_far_from_one_are_no_trouble():
    costs, sizes = problem(3)
    plain = choose(costs.tolist(), sizes.tolist(), 15.0)
    assert choose((costs * 1e-18).tolist(), (sizes * 1e9).tolist(), 15.0e9) == plain


def test_layers_may_have_different_configurations():
    assert choose([[1.0], [5.0, 1.0, 9.0]], [[2.0], [1.0, 3.0, 2.0]], 5.0) == [0, 1]
    assert choose([[1.0], [5.0, 1.0, 9.0]], [[2.0], [1.0, 3.0, 2.0]], 4.9) == [0, 0]


def test_what_cannot_be_chosen_is_named():
    with pytest.raises(InputError, match="too small; at least 3"):
        choose([[1.0], [5.0]], [[2.0], [1.0]], 2.0)
    with pytest.raises(InputError, match="different shapes"):
        choose([[1.0]], [[2.0, 3.0]], 2.0)
    with pytest.raises(InputError, match="not finite"):
        choose([[float("nan")]], [[2.0]], 3.0)


@pytest.mark.parametrize(("shape", "rank"), [((256, 256), 4), ((768, 256), 6), ((4096, 4096), 64), ((16, 32), 1)])
def test_the_rank_is_what_half_a_bit_pays_for(shape, rank):
    rows, columns = shape
    assert affordable_rank(rows, columns, 64, 0.5) == rank
    assert rank == 1 or 16 * rank * (rows + columns) / (rows * columns) <= 0.5


def test_what_the_solver_prints_of_its_own_does_not_reach_standard_output(capfd):
    """HiGHS says a line of its debugging on this problem; a program's JSON would be broken by it."""
    random = np.random.default_rng(2)
    weights = random.integers(4, 40, 56) * 1000
    sizes = weights[:, None] * np.array([2, 3, 4, 8]) + random.integers(0, 2, (56, 4)) * 500
    costs = random.exponential(1, (56, 1)) * np.exp(-1.4 * np.array([2, 3, 4, 8])) * random.uniform(0.9, 1.1, (56, 4))
    found = choose(costs.tolist(), sizes.tolist(), 3.5 * weights.sum())
    assert capfd.readouterr() == ("", "") and total(sizes, found) <= 3.5 * weights.sum()
    print("said")
    assert capfd.readouterr().out == "said\n"


def test_whole_sizes_may_fill_the_budget_to_the_last_bit():
    """Nothing is kept back for the solver's tolerance where sums are whole numbers."""
    sizes = [[20480, 40960, 81920]] * 40
    found = choose([[9.0, 3.0, 1.0]] * 40, sizes, 40960 * 40)
    assert total(sizes, found) == 40960 * 40 and found == [1] * 40
    assert choose([[9.0, 3.0, 1.0]] * 40, sizes, 40960 * 40 - 1).count(0) == 1


def test_layers_that_no_number_tells_apart_are_served_in_their_order():
    costs, sizes = [[5.0, 2.0], [7.0, 1.0], [5.0, 2.0], [5.0, 2.0]], [[2.0, 4.0]] * 4
    assert choose(costs, sizes, 12.0) == [1, 1, 0, 0]
