"""An allocation by the best bargain first: close to the best one, in no time, for any number of layers."""

from __future__ import annotations

from itertools import pairwise

from fewbits.allocation.pareto import lower_hull, saving
from fewbits.core.allocation_method import AllocationProblem
from fewbits.core.errors import InputError


def allocate_by_bargains(problem: AllocationProblem, budget: float) -> dict[str, int]:
    """Every part begins with its smallest option; steps along the parts' hulls are bought by the loss that each bit saves.

    A part whose next step no longer fits is left as it is. What is lost to the best allocation is less than one step's
    saving. Of equal bargains the first part's comes first. Raises InputError where even the smallest options do not fit.
    """
    hulls = {part: lower_hull(problem.losses[part], sizes) for part, sizes in problem.sizes.items()}
    chosen = {part: hull[0] for part, hull in hulls.items()}
    spent = problem.size(list(chosen.values()))
    if spent > budget:
        raise InputError(f"a budget of {budget:.6g} is too small; at least {spent:.6g} would be right")
    offers = []
    for place, (part, hull) in enumerate(hulls.items()):
        for step, (first, second) in enumerate(pairwise(hull)):
            offers.append((-saving(problem.losses[part], problem.sizes[part], first, second), place, step, part, first, second))
    for *_, part, first, second in sorted(offers):
        extra = problem.sizes[part][second] - problem.sizes[part][first]
        if chosen[part] == first and spent + extra <= budget:
            chosen[part] = second
            spent += extra
    return chosen
