"""What rectified Gaussian variables have in common, from their means, deviations and correlations alone."""

import math

import torch
from torch import Tensor


def relu_series(mean: Tensor, deviation: Tensor, order: int = 10) -> Tensor:
    """float64 `[n, order + 1]`: c_k = E[relu(y) He_k(z)] / sqrt(k!) of y = mean + deviation z, z standard normal.

    c_0 is the mean behind the rectifier. For two variables whose z have correlation r, Mehler's formula gives
    E[relu(y) relu(y')] = sum_k c_k c'_k r^k. The second derivative of relu is an impulse, so for k >= 2 the expectation is
    deviation * density(t) * He_{k-2}(-t) at t = mean / deviation. Entries with deviation 0 are constants.
    """
    mean, deviation = mean.double(), deviation.double()
    at = mean / deviation.clamp(min=1e-30)
    density = torch.exp(-at.square() / 2) / math.sqrt(2 * math.pi)
    below = torch.special.ndtr(at)
    found = [mean * below + deviation * density, deviation * below]
    previous, hermite = torch.zeros_like(at), torch.ones_like(at)
    for k in range(2, order + 1):
        # Far from the kink the density is 0, and the polynomial, which may overflow there, does not count.
        found.append(torch.where(density > 0, deviation * density * hermite, 0) / math.sqrt(math.factorial(k)))
        previous, hermite = hermite, -at * hermite - (k - 2) * previous
    return torch.stack(found[: order + 1], dim=1)


def relu_inner(left: Tensor, right: Tensor, correlation: Tensor) -> Tensor:
    """`[n, m]`: sum_k left_k right_k correlation^k for two series `[n, order + 1]` and `[m, order + 1]` of `relu_series`.

    With the first column zeroed these are covariances. It stays positive semidefinite however short the series is.
    """
    total = torch.zeros_like(correlation)
    for one, other in zip(reversed(left.unbind(1)), reversed(right.unbind(1)), strict=True):
        total = total * correlation + one[:, None] * other
    return total
