from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.allocation.greedy import allocate_by_bargains
from fewbits.allocation.ilp import allocate_by_program
from fewbits.allocation.pareto import frontier, lower_hull, saving
from fewbits.core.allocation_method import AllocationProblem
from fewbits.core.errors import InputError

SOLVERS = (allocate_by_program, allocate_by_bargains)


@st.composite
def problems(draw):
    """A few parts whose larger options mostly, but not always, lose less; and a budget that something fits in."""
    options = draw(st.integers(2, 4))
    rows = draw(st.integers(1, 5))
    numbers = st.lists(st.integers(1, 60), min_size=options, max_size=options)
    sizes = {f"part{row}": tuple(draw(numbers)) for row in range(rows)}
    losses = {part: tuple(value / 8 for value in draw(numbers)) for part in sizes}
    low, high = (sum(pick(row) for row in sizes.values()) for pick in (min, max))
    return AllocationProblem(tuple(map(str, range(options))), sizes, losses), draw(st.integers(low, high))


def cost(problem, chosen):
    return sum(problem.losses[part][option] for part, option in chosen.items())


def size(problem, chosen):
    return problem.size(list(chosen.values()))


def brute_force(problem, budget):
    every = product(range(len(problem.options)), repeat=len(problem.sizes))
    return min(cost(problem, dict(zip(problem.sizes, one, strict=True))) for one in every if problem.size(list(one)) <= budget)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_integer_program_is_as_good_as_trying_everything(given):
    problem, budget = given
    chosen = allocate_by_program(problem, budget)
    assert list(chosen) == list(problem.sizes) and size(problem, chosen) <= budget
    assert cost(problem, chosen) == pytest.approx(brute_force(problem, budget), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_bargains_keep_the_budget_and_lose_less_than_one_step(given):
    problem, budget = given
    chosen = allocate_by_bargains(problem, budget)
    steps = [0.0]
    for part, row in problem.losses.items():
        hull = lower_hull(row, problem.sizes[part])
        steps += [row[first] - row[second] for first, second in pairwise(hull)]
    assert size(problem, chosen) <= budget
    assert brute_force(problem, budget) - 1e-9 <= cost(problem, chosen) <= brute_force(problem, budget) + max(steps) + 1e-9


@settings(max_examples=40, deadline=None)
@given(problems())
def test_every_step_of_a_hull_is_a_worse_bargain_than_the_one_before(given):
    problem, _ = given
    for part, losses in problem.losses.items():
        sizes = problem.sizes[part]
        hull = lower_hull(losses, sizes)
        steps = [saving(losses, sizes, first, second) for first, second in pairwise(hull)]
        assert sizes[hull[0]] == min(sizes) and losses[hull[-1]] == min(losses)
        assert all(step > 0 for step in steps) and steps == sorted(steps, reverse=True)
        # No option lies below the line between two neighbours of the hull.
        for first, second in pairwise(hull):
            for option in range(len(sizes)):
                if sizes[first] <= sizes[option] <= sizes[second]:
                    line = losses[first] - saving(losses, sizes, first, second) * (sizes[option] - sizes[first])
                    assert losses[option] >= line - 1e-9


@pytest.mark.parametrize("solve", SOLVERS)
def test_equal_parts_are_served_in_their_order_every_time(solve):
    """Six layers that no number tells apart, and bits for four of them."""
    row = ((10, 20), (4.0, 1.0))
    problem = AllocationProblem(("2", "4"), {f"layer{i}": row[0] for i in range(6)}, {f"layer{i}": row[1] for i in range(6)})
    assert list(solve(problem, 105).values()) == [1, 1, 1, 1, 0, 0]
    assert [list(solve(problem, 105).values()) for _ in range(3)] == [[1, 1, 1, 1, 0, 0]] * 3
    renamed = AllocationProblem(("2", "4"), {f"z{9 - i}": row[0] for i in range(6)}, {f"z{9 - i}": row[1] for i in range(6)})
    assert list(solve(renamed, 105).values()) == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("solve", SOLVERS)
def test_more_bits_are_never_worse_and_too_few_are_refused(solve):
    problem = AllocationProblem(("2", "3", "4"), {"a": (2, 3, 4), "b": (20, 30, 40)}, {"a": (9.0, 3.0, 1.0), "b": (8.0, 2.0, 0.5)})
    points = frontier(problem, solve)
    assert points[0] == (22, 17.0) and points[-1] == (44, 1.5)
    assert all(one[0] < two[0] and one[1] > two[1] for one, two in pairwise(points))
    with pytest.raises(InputError, match="at least 22"):
        solve(problem, 21)


def test_a_problem_with_a_missing_number_is_refused():
    with pytest.raises(InputError, match="a: 1 numbers for 2 options"):
        AllocationProblem(("2", "4"), {"a": (1,)})
    assert AllocationProblem(("4", "2", "8"), {"a": (40, 20, 80), "b": (4, 2, 8)}).by_size() == (1, 0, 2)
