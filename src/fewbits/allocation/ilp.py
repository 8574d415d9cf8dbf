"""The best allocation, by integer program."""

from __future__ import annotations

from fewbits.core.allocation_method import AllocationProblem
from fewbits.solvers.budget import choose


def allocate_by_program(problem: AllocationProblem, budget: float) -> dict[str, int]:
    """The options with the least sum of losses within `budget` bits, exactly (HiGHS). Raises what `solvers.budget.choose` raises."""
    chosen = choose(list(problem.losses.values()), list(problem.sizes.values()), budget)
    return dict(zip(problem.sizes, chosen, strict=True))
