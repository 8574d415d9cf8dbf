"""Steps whose gradient is passed on as if they were not there (straight-through estimator, arXiv 1308.3432, section 4)."""

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, replacement: Tensor, window: float | None) -> Tensor:
        ctx.window = window
        ctx.save_for_backward(values if window is not None else values.new_empty(0))
        return replacement.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        if ctx.window is None:
            return gradients[0], None, None
        return torch.where(ctx.saved_tensors[0].abs() <= ctx.window, gradients[0], 0.0), None, None


def straight_through(values: Tensor, replacement: Tensor, window: float | None = None) -> Tensor:
    """`replacement` exactly, with its gradient given to `values` of the same shape; with a window only where |value| is within it."""
    return _StraightThrough.apply(values, replacement.detach(), window)  # type: ignore[no-any-return]


def sign_through(values: Tensor, window: float | None = None) -> Tensor:
    """-1 below zero and 1 from zero on; the gradient passes straight through, within the window if there is one."""
    # torch.sign makes 0 of 0, which would be a third level.
    return straight_through(values, torch.where(values.detach() < 0, -1.0, 1.0).to(values.dtype), window)


def round_through(values: Tensor) -> Tensor:
    """The nearest whole numbers, halves to even; the gradient passes straight through."""
    return straight_through(values, values.detach().round())
