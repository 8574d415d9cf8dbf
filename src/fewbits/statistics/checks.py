"""What every accumulator asks of the tokens that it is given."""

import math

import torch
from torch import Tensor

from fewbits.core.errors import InputError, NumericsError


def checked_tokens(inputs: Tensor, features: int) -> Tensor:
    """`inputs` if they are `[tokens, features]` and finite, else InputError or NumericsError."""
    if inputs.ndim != 2 or inputs.shape[1] != features:
        raise InputError(f"inputs {list(inputs.shape)} do not fit a statistic of {features} features; [tokens, {features}] would")
    if not is_finite(inputs):
        raise NumericsError("the inputs of a layer are not finite; the model, or the calibration text, is broken")
    return inputs


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is, without a second tensor of that size: a sum with one bad term is bad.

    The sum in the tensor's own dtype is the faster one; only where that overflowed is it made in float64.
    """
    tensor = tensor.detach()
    return math.isfinite(float(tensor.sum())) or math.isfinite(float(tensor.sum(dtype=torch.float64)))
