"""Statistics of inputs whose features are put in another order, without gathering them anew."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy

from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.method import Accumulator, Statistics
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.moments import Moments
from fewbits.statistics.ranges import Ranges
from fewbits.statistics.sample import Sample

KINDS = (Hessian, Moments, Ranges, Sample)


def reordered(statistics: Statistics, order: Tensor, kinds: Iterable[type[Accumulator]]) -> Statistics:
    """Those of `kinds` as if feature i of the inputs had been feature `order[i]`; what is given stays as it is.

    Sensitivities and choices are of the old order and left out. Raises InputError for a kind that it does not know.
    """
    return Statistics(*(_reordered(statistics[kind], order) for kind in kinds), tokens=statistics.tokens)


def _reordered(one: Accumulator, order: Tensor) -> Accumulator:
    made = copy(one)
    if isinstance(one, Hessian) and isinstance(made, Hessian):
        made._sums = one.matrix[order][:, order]  # the matrix first: sums alone are valid in one half
        made._scale = one._scale
    elif isinstance(made, Moments):
        made.sums = made.sums[:, order]
    elif isinstance(made, Ranges):
        made.low, made.high = made.low[order], made.high[order]
    elif isinstance(made, Sample):
        made.inputs = made.inputs[:, order]
    else:
        raise InputError(f"{type(one).__name__} cannot be put in another order; {', '.join(kind.__name__ for kind in KINDS)} can")
    return made
