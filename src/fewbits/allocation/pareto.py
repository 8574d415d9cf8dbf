"""The options that are worth having, and what every budget would buy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fewbits.core.allocation_method import AllocationProblem
from fewbits.solvers.budget import efficient


def lower_hull(losses: Sequence[float], sizes: Sequence[float]) -> list[int]:
    """Indices, by rising size, of the options on the lower convex hull: each step saves less for a bit than the step before."""
    hull: list[int] = []
    for index in efficient(losses, sizes).tolist():
        # An option inside the hull is a worse bargain than going past it.
        while len(hull) > 1 and saving(losses, sizes, hull[-2], hull[-1]) <= saving(losses, sizes, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def saving(losses: Sequence[float], sizes: Sequence[float], first: int, second: int) -> float:
    """The loss that going from the first option to the larger second one saves for each bit."""
    return (losses[first] - losses[second]) / (sizes[second] - sizes[first])


def frontier(
    problem: AllocationProblem, solve: Callable[[AllocationProblem, float], dict[str, int]], points: int = 17
) -> list[tuple[int, float]]:
    """(bits, loss foretold) of the solutions for evenly spaced budgets, from the smallest sizes to the largest; no point twice."""
    low, high = (sum(pick(row) for row in problem.sizes.values()) for pick in (min, max))
    found: list[tuple[int, float]] = []
    for step in range(points):
        chosen = list(solve(problem, low + (high - low) * step / max(points - 1, 1)).values())
        point = problem.size(chosen), sum(row[option] for row, option in zip(problem.losses.values(), chosen, strict=True))
        if not found or point != found[-1]:
            found.append(point)
    return found
