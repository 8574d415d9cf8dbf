"""Scales between a layer's input and its weight: what is made larger on one side is made smaller on the other."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SMALLEST, _LARGEST = 1e-4, 1e4  # a scale and its inverse are both normal numbers in fp16


def smoothing_scale(input_magnitude: Tensor, weight_magnitude: Tensor, strength: float) -> Tensor:
    """s = max|x|**strength / max|w|**(1 - strength), `[features]`; 1 where either is zero (arXiv 2211.10438, equation 4).

    Inputs are divided by s, the weight's columns multiplied.
    """
    usable = (input_magnitude > 0) & (weight_magnitude > 0)
    scale = input_magnitude.clamp(min=1e-12).pow(strength) / weight_magnitude.clamp(min=1e-12).pow(1 - strength)
    return torch.where(usable, scale, 1.0).clamp(_SMALLEST, _LARGEST)


def search_scale(
    weights: Sequence[Tensor], second_moment: Tensor, magnitude: Tensor, round_weight: Callable[[Tensor], Tensor], steps: int = 20
) -> Tensor:
    """The s = magnitude**r, r = 0, 1/steps, ..., that loses least on the outputs of all `weights [out, in]` (arXiv 2306.00978, eq. 4, 5).

    The loss is the sum of tr(E M E^T) with E = round(W s) / s - W and M `second_moment [in, in]`: the exact squared output
    error on the calibration inputs. r = 0 leaves the weights alone, so the result is never worse there than no scale.
    """
    best, least = torch.ones_like(magnitude), float("inf")
    for step in range(steps):
        scale = magnitude.clamp(min=1e-12).pow(step / steps).clamp(min=_SMALLEST)
        scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(_SMALLEST, _LARGEST)
        loss = sum(float(output_error(round_weight(weight * scale) / scale - weight, second_moment)) for weight in weights)
        if loss < least:
            best, least = scale, loss
    return best


def output_error(difference: Tensor, second_moment: Tensor) -> Tensor:
    """tr(E M E^T) for E `[out, in]`."""
    return ((difference @ second_moment) * difference).sum()
