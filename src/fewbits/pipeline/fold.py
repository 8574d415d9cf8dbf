"""A scale that all readers of a norm apply to their input is the norm's own business: move it there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.diagonal import DiagonalScale


def common_scale(weights: Mapping[str, CompressedTensor]) -> Tensor | None:
    """The scale [features] that every one of `weights` applies first to its input, or None."""
    first = [weight.input_transforms[0] for weight in weights.values() if weight.input_transforms]
    scales = [transform.scale for transform in first if isinstance(transform, DiagonalScale)]
    if not scales or len(scales) != len(weights) or not all(torch.equal(scales[0], scale) for scale in scales):
        return None
    return scales[0]


def without_scale(weight: CompressedTensor) -> CompressedTensor:
    """The same tensor for inputs that are scaled already."""
    return replace(weight, input_transforms=weight.input_transforms[1:])


def scale_norm(norm: nn.Module, scale: Tensor) -> dict[str, Tensor]:
    """Make `norm` return its outputs times `scale [features]`; its new parameters by name, empty where it cannot.

    Whether a norm multiplies by its weight or by one plus its weight is asked from the norm itself.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(weight, Tensor) or weight.shape != scale.shape:
        return {}
    old = {name: tensor.detach().clone() for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None}
    features = scale.shape[0]
    probe = torch.linspace(-1.5, 2.0, 3 * features, dtype=weight.dtype, device=weight.device).view(3, features)
    wide = scale.to(device=weight.device, dtype=torch.float32)
    with torch.no_grad():
        wanted = norm(probe).float() * wide
        offset = _offset(norm, probe)
        weight.copy_((old["weight"].float() + offset) * wide - offset)
        if bias is not None:
            bias.copy_(old["bias"].float() * wide)
        tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
        if torch.allclose(norm(probe).float(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())):
            return {name: getattr(norm, name).detach().clone() for name in old}
        for name, tensor in old.items():
            getattr(norm, name).copy_(tensor)
    return {}


def _offset(norm: nn.Module, probe: Tensor) -> float:
    """0 where the norm multiplies by its weight, 1 where by one plus its weight."""
    kept = norm.weight.detach().clone()  # type: ignore[union-attr, operator]
    norm.weight.zero_()  # type: ignore[union-attr, operator]
    silent = norm(probe)
    norm.weight.copy_(kept)  # type: ignore[union-attr, operator]
    return 0.0 if torch.equal(silent, silent[:1].expand_as(silent)) else 1.0
