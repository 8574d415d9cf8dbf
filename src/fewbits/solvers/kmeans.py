"""Weighted k-means of numbers, for all rows of a matrix at once: exact by dynamic programming, or Lloyd's iteration.

On a line an optimal cluster is an interval of the sorted values, so the best clustering is a shortest path (Wu, 1991).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.kernels import native

_ROWS = 256  # of a chunk


def cluster_rows(values: Tensor, weights: Tensor, count: int, *, bins: int = 128, iterations: int = 50) -> Tensor:
    """Levels float32 `[rows, count]`, ascending, of a small sum of weights * (value - nearest level)**2 in each row.

    `values` and `weights` are `[rows, columns]`, weights zero or more. A row's sorted values are merged into `bins` runs (each
    value its own run where there are no more), whose best clustering is found exactly; Lloyd's iteration on the values
    themselves follows. Where a row has fewer different values than levels, levels repeat. Values without weight change nothing; a
    row of zero weights counts all values alike. Raises InputError for shapes that differ, a negative weight, or a count below 1.
    """
    if values.shape != weights.shape or values.ndim != 2 or count < 1:
        raise InputError(f"values {list(values.shape)}, weights {list(weights.shape)} and {count} levels do not fit")
    if bool((weights < 0).any()):
        raise InputError("a weight is negative; zero or more would be right")
    found = []
    for part, share in zip(values.split(_ROWS), weights.split(_ROWS), strict=True):
        share = torch.where(share.sum(1, keepdim=True) > 0, share, 1.0)
        highest = torch.where(share > 0, part, -torch.inf).amax(1, keepdim=True)
        ordered, order = torch.where(share > 0, part, highest).double().sort(dim=1)  # what has no weight has no say
        shared = share.double().gather(1, order)
        levels = _lloyd(ordered, shared, exact_levels(*_runs(ordered, shared, bins), count), iterations)
        found.append(levels.float())
    return torch.cat(found)


def cluster_pools(pools: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Levels float32 `[pools, count]`, ascending, as `cluster_rows` finds them for the values `[n]` and weights `[n]` of each pool.

    Equal values are merged first: where there are no more different ones than levels, they are the levels, and the last of
    them is repeated. All levels of an empty pool are zero.
    """
    merged = [torch.unique(values.double(), return_inverse=True) for values, _ in pools]
    found = torch.zeros(len(pools), count)
    large = [number for number, (different, _) in enumerate(merged) if len(different) > count]
    for number, (different, _) in enumerate(merged):
        if 0 < len(different) <= count:
            found[number] = torch.cat([different, different[-1:].expand(count - len(different))])
    if large:
        width = max(len(merged[number][0]) for number in large)
        values, weights = torch.zeros(2, len(large), width, dtype=torch.float64)
        for row, number in enumerate(large):
            different, place = merged[number]
            values[row], values[row, : len(different)] = different[-1], different  # what is filled up has no weight
            weights[row].index_add_(0, place, pools[number][1].double())
        found[large] = cluster_rows(values, weights, count, bins=max(128, 2 * count))
    return found


def _runs(ordered: Tensor, weights: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Neighbouring values merged into at most `bins` runs: their weighted means and weights."""
    rows, columns = ordered.shape
    if columns <= bins:
        return ordered, weights
    # Half of the runs go where levels are densest in the limit, by (weight / gap)**(1/3) along the line: heavy values and those
    # far out get runs of their own, whose inner spread the path does not see. The other half is even in rank.
    gaps = ordered.diff(dim=1)
    gaps = torch.cat([gaps[:, :1], gaps], dim=1) + torch.cat([gaps, gaps[:, -1:]], dim=1)
    density = weights.clamp(min=0).pow(1 / 3) * gaps.pow(2 / 3)
    counted = (weights > 0).double()
    density = density / density.sum(1, keepdim=True).clamp(min=1e-300) + counted / counted.sum(1, keepdim=True)
    run = (density.cumsum(1) / density.sum(1, keepdim=True) * bins).long().clamp(max=bins - 1)
    mass = torch.zeros(rows, bins, dtype=ordered.dtype).scatter_add_(1, run, weights)
    moment = torch.zeros(rows, bins, dtype=ordered.dtype).scatter_add_(1, run, weights * ordered)
    size = torch.zeros(rows, bins, dtype=ordered.dtype).scatter_add_(1, run, torch.ones_like(ordered))
    plain = torch.zeros(rows, bins, dtype=ordered.dtype).scatter_add_(1, run, ordered) / size.clamp(min=1)
    means = torch.where(mass > 0, moment / mass.clamp(min=1e-300), plain)
    # An empty run stands where its predecessor does, with no weight.
    means = torch.where(size > 0, means, -torch.inf).cummax(1).values
    return torch.where(torch.isinf(means), ordered[:, :1], means), mass


def exact_levels(ordered: Tensor, weights: Tensor, count: int) -> Tensor:
    """The levels `[rows, count]` of the least weighted squared error of `ordered [rows, n]`, ascending values; float64.

    O(count n log n) a row: the best last interval moves right with the value that it ends at, so halves of the range are
    searched between the bounds that the middle gives.
    """
    values, mass = ordered.double().numpy(), weights.double().numpy()
    rows, n = values.shape
    center = values.mean(1, keepdims=True)  # less is lost in differences of sums
    shifted = values - center
    zero = np.zeros((rows, 1))
    w = np.concatenate([zero, np.cumsum(mass, axis=1)], axis=1)
    s = np.concatenate([zero, np.cumsum(mass * shifted, axis=1)], axis=1)
    q = np.concatenate([zero, np.cumsum(mass * shifted**2, axis=1)], axis=1)
    row, intervals = np.arange(rows)[:, None], min(count, n)
    if native.chosen() is not None:
        edges = native.best_edges([torch.from_numpy(one) for one in (w, s, q)], intervals).numpy()
    else:
        edges = best_edges(w, s, q, intervals)
    start, end = edges[:, :-1], edges[:, 1:]
    weight = w[row, end] - w[row, start]
    level = (s[row, end] - s[row, start]) / np.where(weight > 0, weight, 1.0) + center
    # An interval without weight may stand anywhere in it.
    level = np.where(weight > 0, level, values[row, np.minimum(start, n - 1)])
    found = torch.from_numpy(np.sort(level, axis=1))
    return torch.cat([found, found[:, -1:].expand(-1, count - found.shape[1])], dim=1)


def best_edges(w: np.ndarray, s: np.ndarray, q: np.ndarray, count: int) -> np.ndarray:
    """int64 `[rows, count + 1]`: edges of the best intervals; `w`, `s`, `q [rows, n + 1]` are sums of weights and moments.

    The definition of the native kernel (csrc/kmeans.cpp), which ends in the same edges.
    """
    rows, n = len(w), w.shape[1] - 1
    row = np.arange(rows)[:, None]

    def cost(start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Of one level for the values start..end-1 of each row."""
        weight, total = w[row, end] - w[row, start], s[row, end] - s[row, start]
        return np.maximum(q[row, end] - q[row, start] - total**2 / np.where(weight > 0, weight, 1.0), 0.0)

    ends = np.broadcast_to(np.arange(n + 1), (rows, n + 1))
    best = cost(np.zeros_like(ends), ends)
    choices = []
    for _ in range(1, count):
        best, choice = _extend(best, cost, rows, n)
        choices.append(choice)
    bounds = [np.full((rows, 1), n)]
    for choice in reversed(choices):
        bounds.append(choice[row, bounds[-1]])
    return np.concatenate([*bounds, np.zeros((rows, 1), dtype=np.int64)], axis=1)[:, ::-1]


def _extend(best: np.ndarray, cost, rows: int, n: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[no-untyped-def]
    """One more level: least cost of the first `end` values and where the last interval starts, for all ends of all rows."""
    row = np.arange(rows)[:, None]
    value = np.empty((rows, n + 1))
    choice = np.zeros((rows, n + 1), dtype=np.int64)
    # Ends are decided middle first; a decided one bounds those at its left and right.
    decided = np.zeros(n + 1, dtype=bool)
    step = 1 << max(n, 1).bit_length()
    low = np.zeros((rows, n + 1), dtype=np.int64)
    high = np.zeros((rows, n + 1), dtype=np.int64)
    while step >= 1:
        ends = np.arange(step // 2 if step > 1 else 0, n + 1, step) if step > 1 else np.flatnonzero(~decided)
        ends = ends[~decided[ends]]
        if len(ends):
            left = _previous(decided, ends)
            right = _following(decided, ends)
            low[:, ends] = np.where(left >= 0, choice[:, np.maximum(left, 0)], 0)
            high[:, ends] = np.minimum(np.where(right <= n, choice[:, np.minimum(right, n)], n), ends)
            span = int((high[:, ends] - low[:, ends]).max()) + 1
            least = np.full((rows, len(ends)), np.inf)
            where = low[:, ends].copy()
            all_ends = np.broadcast_to(ends, (rows, len(ends)))
            for offset in range(span):
                start = low[:, ends] + offset
                inside = start <= high[:, ends]
                start = np.minimum(start, all_ends)
                trial = np.where(inside, best[row, start] + cost(start, all_ends), np.inf)
                better = trial < least
                least, where = np.where(better, trial, least), np.where(better, start, where)
            value[:, ends], choice[:, ends] = least, where
            decided[ends] = True
        step //= 2
    return value, choice


def _previous(decided: np.ndarray, ends: np.ndarray) -> np.ndarray:
    known = np.flatnonzero(decided)
    at = np.searchsorted(known, ends) - 1
    return np.where(at >= 0, known[np.maximum(at, 0)] if len(known) else -1, -1)


def _following(decided: np.ndarray, ends: np.ndarray) -> np.ndarray:
    known = np.flatnonzero(decided)
    at = np.searchsorted(known, ends)
    beyond = len(decided)
    return np.where(at < len(known), known[np.minimum(at, max(len(known) - 1, 0))] if len(known) else beyond, beyond)


def _lloyd(ordered: Tensor, weights: Tensor, levels: Tensor, iterations: int) -> Tensor:
    """Each level goes to the mean of the values that are nearest to it, until none moves; a level without weight stays."""
    rows = len(ordered)
    zero = torch.zeros(rows, 1, dtype=ordered.dtype)
    mass, moment = (torch.cat([zero, part.cumsum(1)], dim=1) for part in (weights, weights * ordered))
    for _ in range(iterations):
        middles = (levels[:, 1:] + levels[:, :-1]) / 2
        inner = torch.searchsorted(ordered.contiguous(), middles.contiguous())
        edges = torch.cat([torch.zeros(rows, 1, dtype=torch.long), inner, torch.full((rows, 1), ordered.shape[1])], dim=1)
        weight = mass.gather(1, edges[:, 1:]) - mass.gather(1, edges[:, :-1])
        mean = (moment.gather(1, edges[:, 1:]) - moment.gather(1, edges[:, :-1])) / weight.clamp(min=1e-300)
        moved = torch.where(weight > 0, mean, levels).sort(dim=1).values
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """uint8 `[rows, columns]`: for each value the number of the nearest of its row's ascending `levels [rows, count]`."""
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), values.contiguous()).to(torch.uint8)


def clustering_error(values: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """Weighted squared distance of each row's values to their nearest level; float64 `[rows]`."""
    nearest = levels.double().gather(1, nearest_level(values, levels).long())
    return (weights.double() * (values.double() - nearest).square()).sum(1)
