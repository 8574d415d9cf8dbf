"""What a budget of bits buys: one configuration for each layer, or the rank of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag

from fewbits.core.errors import InputError, NumericsError
from fewbits.core.quiet import without_native_prints


def choose(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float, *, seconds: float = 60.0) -> list[int]:
    """For each layer the index of one configuration: the least sum of `costs`, with a sum of `sizes` of at most `budget`.

    `costs[layer][configuration]` and `sizes` alike, any unit; layers may differ in how many configurations they have. Solved
    as an integer program by HiGHS (LQ-LoRA, arXiv 2311.12023, section 3.2) to a relative gap of 1e-9, or as far as it gets in
    `seconds`. Of layers with the very same numbers the first ones get the larger sizes. Raises InputError where the shapes
    differ, a number is not finite, or even the smallest sizes exceed the budget; NumericsError where the solver finds nothing.
    """
    if not costs or [len(row) for row in costs] != [len(row) for row in sizes] or not all(len(row) for row in costs):
        raise InputError("costs and sizes of different shapes cannot be balanced; one or more configurations a layer would be right")
    kept = [efficient(cost, size) for cost, size in zip(costs, sizes, strict=True)]
    cost = np.concatenate([np.asarray(row, float)[chosen] for row, chosen in zip(costs, kept, strict=True)])
    size = np.concatenate([np.asarray(row, float)[chosen] for row, chosen in zip(sizes, kept, strict=True)])
    least = sum(min(row) for row in sizes)
    if least > budget:
        raise InputError(f"a budget of {budget:.6g} is too small; at least {least:.6g} would be right")
    one_each = block_diag([np.ones((1, len(chosen))) for chosen in kept])
    unit, room = _scaled(size, budget, least)
    with without_native_prints():
        found = milp(
            cost * (1000 / max(float(np.linalg.norm(cost)), 1e-300)),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size[None] / unit, -np.inf, room)],
            integrality=np.ones(len(cost)),
            bounds=Bounds(0, 1),
            options={"time_limit": seconds, "mip_rel_gap": 1e-9},
        )
    if found.x is None:
        raise NumericsError(f"the integer program has no solution: {found.message}")
    starts = np.cumsum([0, *(len(chosen) for chosen in kept)])
    picks = [int(found.x[a:b].argmax()) for a, b in pairwise(starts)]
    choices = [int(chosen[pick]) for chosen, pick in zip(kept, picks, strict=True)]
    return _within(_settled(choices, costs, sizes), sizes, budget)


def affordable_rank(rows: int, columns: int, rank: int, bits: float) -> int:
    """At most `rank`, such that factors of 16 bits take at most `bits` for each of the matrix's weights; at least 1."""
    return max(1, min(rank, rows, columns, int(bits * rows * columns / (16 * (rows + columns)))))


def efficient(cost: Sequence[float], size: Sequence[float]) -> np.ndarray:
    """Indices, by rising size, of the configurations that no other one beats in both numbers; a best solution needs no others.

    Raises InputError where a number is not finite.
    """
    if not np.isfinite([*cost, *size]).all():
        raise InputError("a cost or a size is not finite; finite weights would be right")
    order = sorted(range(len(cost)), key=lambda index: (size[index], cost[index], index))
    kept, least = [], np.inf
    for index in order:
        if cost[index] < least:
            kept.append(index)
            least = cost[index]
    return np.asarray(kept)


def _scaled(sizes: np.ndarray, budget: float, least: float) -> tuple[float, float]:
    """What sizes are divided by for the solver, and the most that their sum may then be.

    The solver meets a constraint to a tolerance only. Sums of whole sizes are multiples of their common divisor, so half
    of it more than the last one within the budget is asked for; of others a hair less than the budget, unless nothing else fits.
    """
    if np.array_equal(sizes, np.round(sizes)) and sizes.max() < 2**53:
        divisor = int(np.gcd.reduce(sizes.astype(np.int64)))
        if 0 < sizes.max() < 1e5 * divisor:
            return float(sizes.max()), float((np.floor(budget / divisor) + 0.5) * divisor / sizes.max())
    unit = max(float(sizes.max()), 1e-300)
    return unit, max(budget * (1 - 1e-9), least) / unit


def _settled(choices: list[int], costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]]) -> list[int]:
    """Layers that no number tells apart are served in their order, however the solver happened to deal the same choices out."""
    alike: dict[tuple[tuple[float, ...], tuple[float, ...]], list[int]] = {}
    for place, rows in enumerate(zip(costs, sizes, strict=True)):
        alike.setdefault((tuple(rows[0]), tuple(rows[1])), []).append(place)
    settled = list(choices)
    for (_, size), places in alike.items():
        dealt = sorted((choices[place] for place in places), key=lambda choice: (-size[choice], choice))
        for place, choice in zip(places, dealt, strict=True):
            settled[place] = choice
    return settled


def _within(choices: list[int], sizes: Sequence[Sequence[float]], budget: float) -> list[int]:
    """The same choices. Raises NumericsError where the solver's tolerance let them exceed the budget."""
    spent = sum(row[choice] for row, choice in zip(sizes, choices, strict=True))
    if spent > budget * (1 + 1e-12):
        raise NumericsError(f"the integer program's solution takes {spent:.9g} of a budget of {budget:.9g}")
    return choices
