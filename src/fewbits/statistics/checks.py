"""What every accumulator asks of the tokens that it is given."""

import math

import torch
from torch import Tensor

from fewbits.core.errors import InputError, NumericsError


def checked_tokens(inputs: Tensor, features: int) -> Tensor:
    """`inputs` if they are `[tokens, features]` and finite, else InputError or NumericsError."""
    if inputs.ndim != 2 or inputs.shape[1] != features:
        raise InputError(f"inputs {list(inputs.shape)} do not fit a statistic of {features} features; [tokens, {features}] would")
    if not math.isfinite(float(inputs.detach().sum(dtype=torch.float64))):  # a sum needs no second tensor of that size
        raise NumericsError("the inputs of a layer are not finite; the model, or the calibration text, is broken")
    return inputs
