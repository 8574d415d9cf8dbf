"""Batch normalization: its statistics gathered anew, and at inference, an affine map of each channel, put into the layer before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def can_fold(norm: nn.Module, channels: int) -> bool:
    """Whether `norm` is a batch normalization of so many channels that remembers their statistics."""
    return isinstance(norm, NORMS) and norm.running_mean is not None and norm.num_features == channels


def fold(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight `[out, ...]` and bias `[out]` of the one layer that does what the layer and the norm behind it do; float64.

    w_i = gamma_i / sigma_i W_i and b_i = beta_i + gamma_i (bias_i - mean_i) / sigma_i with sigma = sqrt(variance + eps).
    """
    assert norm.running_mean is not None and norm.running_var is not None
    factor = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
    shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    offset = 0 if norm.bias is None else norm.bias.double()
    return weight.double() * factor.view(-1, *[1] * (weight.ndim - 1)), offset + factor * shift


@torch.no_grad()
def gather(model: nn.Module, images: Iterable[Any]) -> None:
    """Means and variances of all batch normalizations in `model` anew, each the mean over the batches `images`.

    All else computes as in eval mode, which the model is left in.
    """
    norms = [module for module in model.modules() if isinstance(module, NORMS) and module.running_mean is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
        norm.train()
    try:
        for batch in images:
            model(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
