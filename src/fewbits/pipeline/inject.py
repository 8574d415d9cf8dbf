"""Outlier channels in a model that has none: what it computes stays, what its linear layers read does not."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fewbits.core.checks import check_positive, check_range
from fewbits.core.errors import InputError
from fewbits.models.adapter import Adapter, oriented, weight_matrix
from fewbits.pipeline.fold import scale_norm

_TOLERANCE = 1e-3


@torch.no_grad()
def inject_outliers(
    model: nn.Module, tokens: Tensor, *, share: float = 0.04, factors: tuple[float, float] = (20.0, 40.0), seed: int = 0
) -> dict[str, Tensor]:
    """Multiply a `share` of the channels that each norm of a block gives to linear layers by a factor, and divide those weights' columns.

    Channels and factors are drawn by `seed`, evenly between the two `factors`. One run on `tokens [sequences, length]`
    shows who reads which norm, and a second one that the logits stayed. Returns the factors `[features]` by the norms' full
    names. Raises InputError where no norm was found or the logits changed.
    """
    check_range("share", share, 0, 1)
    check_positive("the smaller factor", min(factors), 20.0)
    adapter = Adapter(model)
    linears = {name: linear for block in adapter.blocks for name, linear in adapter.linears(block).items()}
    before, readers = _readers(model, adapter, linears, tokens)
    generator, found = torch.Generator().manual_seed(seed), {}
    for norm, names in readers.items():
        features = weight_matrix(linears[names[0]]).shape[1]
        scale = torch.ones(features)
        chosen = torch.randperm(features, generator=generator)[: round(share * features)]
        scale[chosen] = factors[0] + (factors[1] - factors[0]) * torch.rand(len(chosen), generator=generator)
        if not scale_norm(model.get_submodule(norm), scale):
            continue
        for name in names:
            weight = cast(Tensor, linears[name].weight)
            weight.copy_(oriented(linears[name], weight_matrix(linears[name]) / scale.to(weight)))
        found[norm] = scale
    after = cast(Any, model)(input_ids=tokens, use_cache=False).logits
    if not found or float((after - before).norm() / before.norm()) > _TOLERANCE:
        raise InputError(f"{type(model).__name__} has no norms that linear layers alone read; another architecture would be right")
    return found


def _readers(
    model: nn.Module, adapter: Adapter, linears: dict[str, nn.Module], tokens: Tensor
) -> tuple[Tensor, dict[str, tuple[str, ...]]]:
    """The logits, and by the full name of each norm of the blocks the linear layers that read its output."""
    inside = tuple(f"{block}." for block in adapter.blocks)
    norms = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(inside) and name not in linears and getattr(getattr(module, "weight", None), "ndim", 0) == 1
    }
    outputs: dict[str, Tensor] = {}
    readers: dict[str, tuple[str, ...]] = {}

    def read(name: str, given: Tensor) -> None:
        for norm, output in outputs.items():
            if output.data_ptr() == given.data_ptr() and output.shape == given.shape:
                readers[norm] = (*readers.get(norm, ()), name)

    hooks = [one.register_forward_hook(lambda m, i, o, name=name: outputs.__setitem__(name, o)) for name, one in norms.items()]
    hooks += [one.register_forward_pre_hook(lambda m, given, name=name: read(name, given[0])) for name, one in linears.items()]
    try:
        logits = cast(Any, model)(input_ids=tokens, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits, readers
