"""What every accumulator asks of the tokens that it is given."""

import torch
from torch import Tensor

from fewbits.core.errors import InputError, NumericsError


def checked_tokens(inputs: Tensor, features: int) -> Tensor:
    """`inputs` if they are `[tokens, features]` and finite, else InputError or NumericsError."""
    if inputs.ndim != 2 or inputs.shape[1] != features:
        raise InputError(f"inputs {list(inputs.shape)} do not fit a statistic of {features} features; [tokens, {features}] would")
    if not bool(torch.isfinite(inputs).all()):
        raise NumericsError("the inputs of a layer are not finite; the model, or the calibration text, is broken")
    return inputs
