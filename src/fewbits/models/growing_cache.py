"""Layers of a dense cache that have room for more tokens than they hold, so that a new token's keys and values are written behind the
others and none of those is copied.

A layer of a `DynamicCache` becomes one of these, and can do all that it could: its `keys` and `values` are views of what is filled, or
whatever is put in their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fewbits.kernels import native

_LEAST = 256  # tokens of new room


class _Side:
    """Keys or values of a layer: a tensor that was given, or the filled part of a room."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __get__(self, layer: Any, kind: type) -> Any:
        if layer is None:
            return self
        given: list[Tensor | None] = layer._given
        if given[self.place] is None and layer._rooms is not None:
            given[self.place] = layer._rooms[self.place][:, :, : layer._filled]
        return given[self.place]

    def __set__(self, layer: Any, states: Tensor | None) -> None:
        if layer._rooms is not None:
            layer._given = [layer.keys, layer.values]
            layer._rooms = None
        layer._given[self.place] = states


class _Growing(DynamicLayer):
    """Rooms are written behind what is filled, and only by the layer that made them: copies of a layer copy them before they write."""

    keys: Any = _Side(0)
    values: Any = _Side(1)
    _given: list[Tensor | None]  # views of what is filled, made when they are asked for; where there are no rooms, keys and values
    _rooms: tuple[Tensor, Tensor] | None  # [batch, heads, room, width]
    _filled: int
    _owner: int
    held: tuple[int, ...]  # addresses and sizes of the rooms

    def take(self, tokens: int) -> bool:
        """Whether there is room for `tokens` more now: for one sequence, and numbers without gradients."""
        if self._rooms is None or self._owner != id(self) or self._filled + tokens > self._rooms[0].shape[2]:
            return self._move(tokens)
        return True

    def holds(self, tokens: int, heads: int, width: int, dtype: torch.dtype) -> bool:
        """Whether rooms hold so many tokens of one sequence, of such keys and values."""
        room = None if self._rooms is None else self._rooms[0]
        return room is not None and self._filled == tokens and room.dtype == dtype and (*room.shape[:2], room.shape[3]) == (1, heads, width)

    def add(self, tokens: int) -> None:
        """So many tokens were written behind the others."""
        self._filled += tokens
        self._given = [None, None]

    def get_seq_length(self) -> int:
        return self._filled if self._rooms is not None else super().get_seq_length()

    def _move(self, tokens: int) -> bool:
        keys, values = self.keys, self.values
        if not self.is_initialized or keys is None or values is None or keys.shape != values.shape or keys.ndim != 4:
            return False
        if any(type(one) is not Tensor or one.requires_grad or not one.is_cpu for one in (keys, values)) or keys.dtype != values.dtype:
            return False
        batch, heads, filled, width = keys.shape
        shape = (batch, heads, filled + max(filled // 2, tokens, _LEAST), width)
        with torch.inference_mode(False):  # whose tensors could not be written outside of it
            made = [native.room_like(torch.empty(shape, dtype=keys.dtype, device="meta")) for _ in range(2)]
        for room, states in zip(made, (keys, values), strict=True):
            room[:, :, :filled] = states
        self._rooms, self._filled, self._owner = (made[0], made[1]), filled, id(self)
        self._given, self.held = [None, None], tuple(native.buffers(made))
        return True


class GrowingLayer(_Growing):
    """A layer of full attention."""

    def update(self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if not self._takes(key_states, value_states):
            return super().update(key_states, value_states, *arguments, **options)
        tokens = key_states.shape[2]
        for room, states in zip(self._rooms or (), (key_states, value_states), strict=True):
            room[:, :, self._filled : self._filled + tokens] = states
        self.add(tokens)
        return self.keys, self.values

    def _takes(self, keys: Tensor, values: Tensor) -> bool:
        """Whether states can be written into the rooms: what has none yet is left as it is, and so is what a gradient may go through."""
        if self._rooms is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or keys.shape != values.shape:
            return False
        room = self._rooms[0]
        fits = all(type(one) is Tensor and one.dtype == room.dtype and one.is_cpu and not one.requires_grad for one in (keys, values))
        return fits and keys.shape[:2] == room.shape[:2] and keys.shape[3] == room.shape[3] and self.take(keys.shape[2])


class GrowingSlidingLayer(_Growing, DynamicSlidingWindowLayer):
    """A layer of sliding attention, as long as the window holds all tokens."""

    def take(self, tokens: int) -> bool:
        return self.cumulative_length + tokens < self.sliding_window and super().take(tokens)

    def add(self, tokens: int) -> None:
        super().add(tokens)
        self.cumulative_length += tokens

    def get_seq_length(self) -> int:
        return int(self.cumulative_length)


_GROWING: dict[type, type[_Growing]] = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: GrowingSlidingLayer}
_GROWN = tuple(_GROWING.values())


def growing_layers(cache: Any, count: int) -> list[_Growing] | None:
    """The layers of a dense cache that has so many, which can grow from now on; None for another cache."""
    if type(cache) is not DynamicCache or cache.offloading or len(cache.layers) != count:
        return None
    layers: list[Any] = cache.layers
    for layer in layers:
        if type(layer) in _GROWN:
            continue
        if type(layer) not in _GROWING or not layer.is_initialized:
            return None
        own = layer.__dict__
        own.update(_given=[own.pop("keys"), own.pop("values")], _rooms=None, _filled=0, _owner=0, held=())
        layer.__class__ = _GROWING[type(layer)]
    return layers
