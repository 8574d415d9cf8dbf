"""The linears that make keys and values, and what a cache is handed of their inputs.

Source: CSKV (arXiv 2409.10593), section 3: what is cached is a narrow projection of a layer's input, made before the rotary embedding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from fewbits.core.cache_method import CacheMethod, Side
from fewbits.core.errors import InputError
from fewbits.models.adapter import LINEAR
from fewbits.models.rotary import Rotary

_SIDES: tuple[Side, Side] = ("keys", "values")


@dataclass(frozen=True)
class Projection:
    """What makes one layer's keys and values; `norm` comes between a key and its rotary embedding, in models that have one."""

    attention: nn.Module
    keys: nn.Module
    values: nn.Module
    norm: nn.Module | None

    def of(self, side: Side) -> nn.Module:
        return self.keys if side == "keys" else self.values

    def finished(self, side: Side, products: Tensor) -> Tensor:
        """Products with the weight `[..., tokens, channels]` as the cache holds them but for the rotation: biased, keys normed."""
        bias = cast(Tensor | None, self.of(side).bias)
        outputs = products if bias is None else products + bias.to(products.dtype)
        if side == "values" or self.norm is None:
            return outputs
        width = cast(Tensor, self.norm.weight).numel()  # of a head, or of all channels
        return cast(Tensor, self.norm(outputs.unflatten(-1, (-1, width)))).flatten(-2)


class Projected(Protocol):
    """A cache layer that seals what its method makes of the projections' inputs."""

    index: int
    method: CacheMethod
    tables: dict[str, Tensor]
    projection: Projection | None
    handed: dict[Side, Tensor]  # `[batch, tokens, width]` of the tokens whose keys and values come next


def find_projections(model: PreTrainedModel) -> dict[int, Projection]:
    """By layer, of those with full attention. Raises InputError where one of them has no linears of its own for keys and for values."""
    found = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        keys, values = (getattr(module, name, None) for name in ("k_proj", "v_proj"))
        if isinstance(index, int) and isinstance(keys, LINEAR) and isinstance(values, LINEAR):
            norm = getattr(module, "k_norm", None)
            found[index] = Projection(module, keys, values, norm if isinstance(norm, nn.Module) else None)
    wanted = [index for index, layer in enumerate(DynamicCache(config=model.config).layers) if type(layer) is DynamicLayer]
    missing = [index for index in wanted if index not in found]
    if missing:
        raise InputError(
            f"{type(model).__name__}, layer {missing[0]}: no k_proj and v_proj were found, so there is no projection to make narrower"
        )
    return {index: found[index] for index in wanted}


@torch.no_grad()
def projection_inputs(model: PreTrainedModel, projections: Mapping[int, Projection], tokens: Tensor) -> dict[int, dict[Side, Tensor]]:
    """What every layer's projections read when the model reads `tokens [batch, length]`: float32 `[batch * length, features]`.

    Keys' and values' are one tensor where the model gives both the same.
    """
    found: dict[int, dict[Side, Tensor]] = {index: {} for index in projections}

    def listener(index: int, side: Side) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def listen(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs = arguments[0].flatten(0, -2).float()
            other = next(iter(found[index].values()), None)
            found[index][side] = other if other is not None and torch.equal(other, inputs) else inputs

        return listen

    hooks = [
        projection.of(side).register_forward_pre_hook(listener(index, side)) for index, projection in projections.items() for side in _SIDES
    ]
    try:
        cast(Any, model.base_model)(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def check_projections(model: PreTrainedModel, projections: Mapping[int, Projection], tokens: Tensor) -> None:
    """Raises InputError where the keys or values that the model caches for `tokens [1, length]` are made in another way than is known."""
    inputs = projection_inputs(model, projections, tokens)
    outputs = cast(Any, model.base_model)(input_ids=tokens, use_cache=True)
    cache = next(value for value in outputs.values() if isinstance(value, Cache))
    positions = torch.arange(tokens.shape[1])[None]
    for index, projection in projections.items():
        layer = cast(DynamicLayer, cache.layers[index])
        for side, cached in (("keys", layer.keys), ("values", layer.values)):
            assert isinstance(cached, Tensor)
            weight = cast(Tensor, projection.of(cast(Side, side)).weight)
            products = inputs[index][cast(Side, side)].to(weight.dtype) @ weight.T
            made = projection.finished(cast(Side, side), products[None]).unflatten(-1, (cached.shape[1], -1)).transpose(1, 2)
            made = Rotary.of(model).apply(made, positions) if side == "keys" else made
            if not torch.allclose(made.float(), cached.float(), rtol=0.02, atol=0.02 * float(cached.float().std())):
                raise InputError(
                    f"{type(model).__name__}, layer {index}: its {side} are not what its projection, a norm and a rotation make; "
                    "a method that seals keys and values themselves would be right"
                )


_LAYERS: weakref.WeakSet[Any] = weakref.WeakSet()
_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def watch_projections(model: PreTrainedModel, layers: list[Any]) -> None:
    """From now on `layers` are handed, before each update, what their method makes of the inputs of `model`'s projections.

    Raises InputError where a layer has no projections, or no tables.
    """
    projections = find_projections(model)
    for layer in layers:
        if not layer.tables:
            raise InputError(f"layer {layer.index} has no tables; those of fewbits.caches for this model would be right")
        layer.projection = projections[layer.index]
    _LAYERS.update(layers)
    for projection in projections.values():
        if projection.attention not in _WATCHED:
            _WATCHED.add(projection.attention)
            _watch(projection)


def _watch(projection: Projection) -> None:
    current: weakref.ref[Any] | None = None

    def enter(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal current
        cache = next((value for value in (*keywords.values(), *arguments) if isinstance(value, Cache)), None)
        layer = None if cache is None else cache.layers[cast(int, module.layer_idx)]
        current = weakref.ref(layer) if layer is not None and layer in _LAYERS else None

    def listener(side: Side) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def listen(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            layer: Projected | None = None if current is None else current()
            if layer is not None:
                layer.handed[side] = layer.method.latent(arguments[0], side, layer.tables)

        return listen

    entering: Callable[..., None] = enter
    projection.attention.register_forward_pre_hook(entering, with_kwargs=True)
    for side in _SIDES:
        projection.of(side).register_forward_pre_hook(listener(side))


def with_handed(layer: Projected, side: Side, states: Tensor) -> Tensor:
    """`states [batch, heads, tokens, head_dim]` with what was handed for them behind each head's channels, for a layer to keep.

    Raises InputError where nothing was.
    """
    latents = layer.handed.pop(side, None)
    batch, heads, tokens, _ = states.shape
    if latents is None or latents.shape[:2] != (batch, tokens):
        raise InputError(f"layer {layer.index} was not handed its inputs; a cache opened for the model that it is given to would be right")
    return torch.cat([states, latents.to(states.dtype).view(batch, tokens, heads, -1).transpose(1, 2)], 3)
