"""Where a sample's outliers begin: quartiles find candidates, the widest gap decides.

Source: CBQ (arXiv 2312.07950), section 3.4, coarse-to-fine pre-processing.
"""

import torch
from torch import Tensor


def largest_reserved(magnitudes: Tensor, *, reach: float = 1.5, spread: float = 1.0) -> Tensor:
    """The largest of `magnitudes` (any shape) that is no outlier, a scalar; the largest of all where there are none.

    Candidates lie above Q3 + reach * (Q3 - Q1). They are split at each place in turn; the split of the largest
    (gap between the two parts)**2 - spread * variance of the outliers is kept, with no outliers at all as one choice.
    """
    values = magnitudes.flatten().sort().values
    quarter, three = values[len(values) // 4], values[3 * len(values) // 4]
    first = int(torch.searchsorted(values, three + reach * (three - quarter), right=True))
    if first == 0 or first == len(values):
        return values[-1]
    candidates = values[first:].double()
    below = values[first - 1 : -1].double()
    # Variance of every upper part from sums taken from the top.
    count = torch.arange(len(candidates), 0, -1, dtype=torch.float64)
    sums, squares = candidates.flip(0).cumsum(0).flip(0), candidates.square().flip(0).cumsum(0).flip(0)
    variance = (squares / count - (sums / count).square()).clamp(min=0)
    score = (candidates - below).square() - spread * variance
    best = int(score.argmax())
    return values[first - 1 + best] if float(score[best]) > 0 else values[-1]
