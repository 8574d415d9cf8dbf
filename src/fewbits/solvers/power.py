"""The exponent of a power grid, searched without data or learned, and codes that are learned over the whole grid.

Source: PowerQuant (arXiv 2301.09858) and NUPES (arXiv 2308.05600); notation as there: L the largest code, M a row's largest
magnitude, a the exponent, q = round(L f(w / M)) the code, f(x) = sign(x) |x|**a.
"""

from collections.abc import Sequence
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from fewbits.core.errors import InputError, NumericsError
from fewbits.formats.power import largest_code, power_codes, power_map

_GRID = 11  # trials over the whole range before the search closes in on the best one's neighbourhood


def power_error(weight: Tensor, exponent: float, bits: int, norm: float = 2.0) -> float:
    """||W - W_hat(a)||_norm of `weight [rows, columns]` on the power grid with each row's largest magnitude, stored in fp16."""
    maxima = weight.abs().amax(1, keepdim=True).half().float()
    most = largest_code(bits)
    rounded = maxima * power_map(power_codes(weight, maxima, exponent, bits) / most, 1 / exponent)
    return float(torch.linalg.vector_norm(weight - rounded, norm))


def search_exponent(
    weights: Tensor | Sequence[Tensor], bits: int, *, low: float = 0.2, high: float = 1.2, norm: float = 2.0, tolerance: float = 0.005
) -> tuple[float, float]:
    """The exponent within `low` and `high` of the least sum of `power_error` over the matrices, and that sum.

    One matrix: an exponent of its own (NUPES); several: one for all (PowerQuant). A bounded scalar search inside the best
    interval of an even grid, as the error has small steps besides its one valley. Raises InputError for an empty range,
    NumericsError where no error is finite.
    """
    if not 0 < low < high:
        raise InputError(f"exponents from {low} to {high} are no range; 0.2 to 1.2 would be right")
    matrices = [weights] if isinstance(weights, Tensor) else list(weights)

    def total(exponent: float) -> float:
        return sum(power_error(matrix, float(exponent), bits, norm) for matrix in matrices)

    step = (high - low) / (_GRID - 1)
    trials = {low + step * index: total(low + step * index) for index in range(_GRID)}
    middle = min(trials, key=lambda exponent: trials[exponent])
    bounds = (max(low, middle - step), min(high, middle + step))
    found = minimize_scalar(total, bounds=bounds, method="bounded", options={"xatol": tolerance})
    trials[float(found.x)] = float(found.fun)
    best = min(trials, key=lambda exponent: trials[exponent])
    if not trials[best] < float("inf"):
        raise NumericsError("the weights are not finite; no exponent fits them")
    return best, trials[best]


class _PowerQuantize(torch.autograd.Function):
    """Rounding on the power grid; the exponent's gradient flows through the code and through the level."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, exponent: Tensor, maximum: Tensor, bits: int) -> Tensor:
        codes = power_codes(weight, maximum, exponent, bits)
        ctx.save_for_backward(weight, exponent, maximum, codes)
        ctx.most = largest_code(bits)
        return maximum * power_map(codes / ctx.most, 1 / exponent)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        weight, exponent, maximum, codes = ctx.saved_tensors
        gradient = gradients[0]
        for_exponent = None
        if ctx.needs_input_grad[1]:
            share = exponent_slope(weight, exponent, maximum, codes, ctx.most)
            for_exponent = (gradient * share).sum().reshape(exponent.shape).to(exponent.dtype)
        # Straight through for the weight, as far as the grid reaches.
        return torch.where(weight.abs() <= maximum, gradient, 0.0), for_exponent, None, None


def exponent_slope(weight: Tensor, exponent: Tensor, maximum: Tensor, codes: Tensor, most: int, *, both: bool = True) -> Tensor:
    """dw_hat / da for each entry, with rounding passed straight through; the shape of `weight [rows, columns]`.

    Through the level: -(w_hat / a^2) ln(k / L); through the code: w_hat / (a k) times L t^a ln t, with k = |q|, t = |w| / M.
    Where k = 0 both are 0. `both` false leaves the second out, which is wrong in sign and size and there for comparison.
    """
    nonzero = codes != 0
    sizes = torch.where(nonzero, codes.abs(), 1.0)
    log_level = torch.log(sizes / most)
    rounded = maximum * codes.sign() * torch.exp(log_level / exponent)
    slope = -rounded / exponent**2 * log_level
    if both:
        log_size = torch.log((weight.abs() / torch.where(maximum == 0, 1.0, maximum)).clamp(1e-6, 1.0))
        slope = slope + rounded / (exponent * sizes) * most * torch.exp(exponent * log_size) * log_size
    return torch.where(nonzero, slope, 0.0)


def power_quantize(weight: Tensor, exponent: Tensor, maximum: Tensor, bits: int) -> Tensor:
    """`weight [rows, columns]` rounded on the power grid, differentiable in the weight and in the exponent (one element).

    `maximum [rows, 1]` is fixed and gets no gradient, else the largest entry drifts. The weight's gradient passes straight
    through within -M to M and is 0 outside; the exponent's is `exponent_slope` (NUPES, section 4). Raises InputError for bits
    outside 2 to 8.
    """
    largest_code(bits)
    return _PowerQuantize.apply(weight, exponent, maximum.detach(), bits)  # type: ignore[no-any-return]


def soft_staircase(codes: Tensor, sharpness: float, bits: int) -> Tensor:
    """A smooth stand-in for rounding real `codes` within -L to L, which lets every code cross into any cell.

    floor(v) + (1 + tanh(b (v - floor(v) - 1/2)) / tanh(b / 2)) / 2: it meets the whole numbers, is nearly the identity for a
    small sharpness b and nearly rounding for 20 and more. `hard_codes` is what it ends in. Raises InputError for a sharpness
    that is not above zero.
    """
    if not sharpness > 0:
        raise InputError(f"sharpness={sharpness} is out of range; about 2 at the start and 20 at the end would be right")
    most = largest_code(bits)
    inside = codes.clamp(-most, most)
    below = inside.detach().floor()
    ends = torch.tanh(torch.tensor(sharpness / 2, dtype=codes.dtype, device=codes.device))
    return below + 0.5 * (1 + torch.tanh(sharpness * (inside - below - 0.5)) / ends)


def hard_codes(codes: Tensor, bits: int) -> Tensor:
    """The whole numbers that `soft_staircase` tends to: round(v) within -L to L."""
    most = largest_code(bits)
    return codes.clamp(-most, most).round()
