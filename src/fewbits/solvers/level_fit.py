"""One set of levels for very many weighted numbers between -1 and 1, and levels that keep their mean and spread."""

import torch
from torch import Tensor

from fewbits.solvers.kmeans import cluster_rows

_BINS = 2**16


def fit_levels(values: Tensor, weights: Tensor, count: int, *, iterations: int = 50) -> Tensor:
    """Levels float32 `[count]`, ascending, of a small sum of weights * (value - nearest level)**2 over `values [n]` within [-1, 1].

    Values that lie in one of 65536 equal bins are merged into their weighted mean, which moves the sum by no more than what
    lies inside of a bin. Weights of zero everywhere count all values alike.
    """
    if not bool((weights > 0).any()):
        weights = torch.ones_like(weights)
    places = ((values.double() + 1) / 2 * _BINS).long().clamp(0, _BINS - 1)
    mass, moment = torch.zeros(2, _BINS, dtype=torch.float64)
    mass.index_add_(0, places, weights.double())
    moment.index_add_(0, places, weights.double() * values.double())
    held = mass > 0
    return cluster_rows((moment[held] / mass[held])[None], mass[held][None], count, bins=max(128, 2 * count), iterations=iterations)[0]


def matched_levels(levels: Tensor, values: Tensor, edges: Tensor) -> Tensor:
    """`levels [count]` shifted and stretched so that `values`, each coded between its `edges [count - 1]`, keep their mean and spread.

    Q-Norm of KVQuant (arXiv 2401.18079): q * sd1 / sd2 + mu1 - mu2 * sd1 / sd2. Values all coded alike leave the levels alone.
    """
    coded = levels[torch.bucketize(values, edges)]
    spread = coded.std(correction=0)
    if not bool(spread > 0):
        return levels
    ratio = values.std(correction=0) / spread
    return levels * ratio + values.mean() - coded.mean() * ratio
