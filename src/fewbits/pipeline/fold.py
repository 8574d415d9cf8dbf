"""A scale that all readers of a norm apply to their input is the norm's own business: move it there.

Nothing is assumed about the architecture: a fold is kept where the block's outputs stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.diagonal import DiagonalScale
from fewbits.layers.linear import CompressedLinear, StoredLinear

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def fold_scales(
    block: nn.Module, layers: Mapping[str, StoredLinear], groups: Iterable[tuple[str, ...]], run: Callable[[], Tensor]
) -> tuple[dict[str, StoredLinear], dict[str, Tensor]]:
    """Fold the scale of every group of layers (names inside `block`) that reads a norm, where `run()` shows no difference.

    `block` holds the layers as CompressedLinear and is changed; `run` gives its outputs. Returns the folded layers and the
    norms' new parameters by their names inside the block.
    """
    folded: dict[str, StoredLinear] = {}
    parameters: dict[str, Tensor] = {}
    for group in groups:
        scale = common_scale({name: layers[name].weight for name in group if name in layers})
        norm = None if scale is None or any(name not in layers for name in group) else _norm_read_by(block, group[0], run)
        if scale is None or norm is None:
            continue
        before, kept = run(), {name: block.get_submodule(name) for name in group}
        old = {name: tensor.detach().clone() for name, tensor in block.get_submodule(norm).named_parameters()}
        changed = scale_norm(block.get_submodule(norm), scale)
        shorter = {name: replace(layers[name], weight=without_scale(layers[name].weight)) for name in group}
        for name, stored in shorter.items():
            block.set_submodule(name, CompressedLinear(stored, kept[name].bias))  # type: ignore[arg-type]
        difference = float((run() - before).float().norm() / before.float().norm().clamp(min=1e-30))
        if changed and difference < _TOLERANCE[before.dtype]:
            folded |= shorter
            parameters |= {f"{norm}.{name}": tensor for name, tensor in changed.items()}
            continue
        for name, linear in kept.items():  # somebody else reads the norm, or it cannot take a scale
            block.set_submodule(name, linear)
        for name, tensor in old.items():
            block.get_submodule(norm).get_parameter(name).data.copy_(tensor)
    return folded, parameters


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
    wide = scale.to(device=weight.device, dtype=torch.float32)
    with torch.no_grad():
        offset = _offset(norm, weight)
        weight.copy_((weight.float() + offset) * wide - offset)
        if bias is not None:
            bias.copy_(bias.float() * wide)
    return {name: parameter.detach().clone() for name, parameter in norm.named_parameters()}


def _offset(norm: nn.Module, weight: Tensor) -> float:
    """0 where the norm multiplies by its weight, 1 where by one plus its weight."""
    probe = torch.linspace(-1.5, 2.0, 2 * len(weight), dtype=weight.dtype, device=weight.device).view(2, -1)
    kept = weight.detach().clone()
    weight.zero_()
    silent = norm(probe)
    weight.copy_(kept)
    return 0.0 if torch.equal(silent[0], silent[1]) else 1.0


def _norm_read_by(block: nn.Module, layer: str, run: Callable[[], Tensor]) -> str | None:
    """The module whose output the layer reads, where it has a weight for every feature and is no layer itself."""
    outputs: dict[str, Tensor] = {}
    read: list[Tensor] = []
    features = block.get_submodule(layer).in_features
    norms = {name: one for name, one in block.named_modules() if getattr(getattr(one, "weight", None), "shape", None) == (features,)}

    def remember(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.__setitem__(name, output)

    hooks = [norm.register_forward_hook(remember(name)) for name, norm in norms.items()]
    hooks.append(block.get_submodule(layer).register_forward_pre_hook(lambda module, inputs: read.append(inputs[0])))
    run()
    for hook in hooks:
        hook.remove()
    same = [name for name, output in outputs.items() if read and output.data_ptr() == read[0].data_ptr() and output.shape == read[0].shape]
    return same[-1] if same else None
