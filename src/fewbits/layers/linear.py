"""Layers whose weight is a compressed tensor: what they share, and the linear one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from fewbits.core.tensor import CompressedTensor, Part, Term, from_stored
from fewbits.formats.lines import laid, lay, may_lie_in_lines, plain
from fewbits.kernels.native import Rooms, is_large

_SEPARATOR = "__"  # buffer names may not contain dots
Stored = TypeVar("Stored", bound=Part)


@dataclass(frozen=True, eq=False)
class StoredLinear(Part, kind="linear"):
    """What is stored of a linear layer: its weight, the quantizer of what the weight's terms read (a part with `apply`), if any.

    `offset [out]` is added to the outputs, beside the layer's own bias.
    """

    weight: CompressedTensor
    activation: Part | None = None
    offset: Tensor | None = None


class CompressedLayer(nn.Module, ABC, Generic[Stored]):
    """A layer that computes with what is `stored`, a part with a field `weight`.

    The stored tensors are buffers, which keep their dtypes whatever dtype the model is cast to. Those of some terms lie in another
    order where `settle` was called, which kernels read faster; what is saved has the order that is stored.
    """

    decoded_at_each_call: ClassVar[bool] = False  # which is faster of codes that lie by rows

    def __init__(self, stored: Stored, bias: Tensor | None = None) -> None:
        super().__init__()
        self.settings = stored.settings()
        self._in_lines: frozenset[int] = frozenset()  # places of the weight's terms that lie in lines
        for name, tensor in stored.tensors().items():
            self.register_buffer(_SEPARATOR.join(name.split(".")), tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._remember(stored)

    @classmethod
    def empty(cls, settings: Mapping[str, Any], bias: Tensor | None = None) -> Self:
        """The layer that `settings` describe with tensors on the meta device, to be filled from a file."""
        tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, dtype, shape in _described(settings)}
        return cls(cast(Stored, from_stored(settings, tensors)), bias)

    @property
    def stored(self) -> Stored:
        """The value that the buffers hold now, as it is written to a file; made anew where terms lie in lines."""
        if not self._in_lines:
            return self.laid
        return _with_terms(self.laid, lambda place, term: plain(term) if place in self._in_lines else term)

    @property
    def laid(self) -> Stored:
        """The same as it lies in memory, which is computed with; made anew only after a buffer was replaced."""
        buffers = self._buffers
        if any(self._seen.get(name) is not tensor for name, tensor in buffers.items()):
            tensors = {".".join(name.split(_SEPARATOR)): tensor for name, tensor in buffers.items() if tensor is not None}
            self._remember(cast(Stored, from_stored(self.settings, tensors)))
        return self._stored[0]

    def settle(self, rooms: Rooms | None = None) -> Self:
        """Moves tensors, such as those that lie in a mapped file, into memory that kernels read fast, in the order that these read fastest;
        no value changes.

        Small ones move where layers share `rooms`, in which they lie together.
        """
        own = rooms or Rooms()
        moved = self._lay_in_lines(own)
        for name, buffer in list(self.named_buffers(recurse=False)):
            if name not in moved and (rooms is not None or is_large(buffer)):
                setattr(self, name, own.moved(buffer))
        _ = self.laid  # what is remembered is of the new buffers: the old ones go
        return self

    def _lay_in_lines(self, rooms: Rooms) -> set[str]:
        """Terms that kernels read faster so; the names of the buffers that this moved."""
        moved = set()
        for place, term in enumerate(self._terms()):
            if self.decoded_at_each_call or not may_lie_in_lines(term):
                continue
            for name, tensor in lay(term, rooms.like).items():
                buffer = _SEPARATOR.join(("weight", "terms", str(place), name))
                setattr(self, buffer, tensor)
                moved.add(buffer)
            self._in_lines |= {place}
        return moved

    def _lay_by_rows(self) -> None:
        """Undoes `_lay_in_lines`."""
        stored, self._in_lines = self.stored, frozenset()
        for name, tensor in stored.tensors().items():
            setattr(self, _SEPARATOR.join(name.split(".")), tensor)

    def _terms(self) -> tuple[Term, ...]:
        return cast(Any, self.laid).weight.terms

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._in_lines:
            destination |= {prefix + _SEPARATOR.join(name.split(".")): tensor for name, tensor in self.stored.tensors().items()}

    def _load_from_state_dict(self, *arguments: Any) -> None:
        if self._in_lines:  # what is loaded has the order that is stored
            self._lay_by_rows()
        super()._load_from_state_dict(*arguments)

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The dense weight, decoded anew: for looking at, not for computing with."""

    def _remember(self, stored: Stored) -> None:
        self._seen = dict(self.named_buffers(recurse=False))
        if self._in_lines:
            stored = _with_terms(stored, lambda place, term: laid(term) if place in self._in_lines else term)
        self._stored = (stored,)  # in a tuple: what it holds are the buffers themselves

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves buffers between devices and refuses to change their dtype: scales in fp16 are what was measured."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = function(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if self._in_lines and function(torch.empty(0, dtype=torch.uint8)).device.type != "cpu":
            self._lay_by_rows()
        bias, self.bias = self.bias, None
        for name, buffer in list(self.named_buffers(recurse=False)):
            setattr(self, name, keep_dtype(buffer))
        if bias is not None:
            self.bias = nn.Parameter(function(bias.data), requires_grad=False)
        return self


class CompressedLinear(CompressedLayer[StoredLinear]):
    """y = W x + b, with rounded activations if so stored."""

    def __init__(self, stored: StoredLinear, bias: Tensor | None = None) -> None:
        super().__init__(stored, bias)
        self.out_features, self.in_features = stored.weight.shape

    @property
    def weight(self) -> Tensor:
        """The dense matrix [out, in], decoded anew: for looking at, not for computing with."""
        return self.stored.weight.decode()

    def forward(self, inputs: Tensor) -> Tensor:
        stored = self.laid
        quantize = None if stored.activation is None else cast(Any, stored.activation).apply
        outputs = stored.weight.matmul(inputs, quantize)
        if stored.offset is not None:
            outputs = outputs + stored.offset.to(outputs.dtype)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.laid.weight.bits_per_weight():.3f} bits per weight"


def _with_terms(stored: Stored, change: Callable[[int, Term], Term]) -> Stored:
    """`stored` with other terms of its weight."""
    weight = cast(Any, stored).weight
    terms = tuple(change(place, term) for place, term in enumerate(weight.terms))
    return cast(Stored, replace(cast(Any, stored), weight=replace(weight, terms=terms)))


def stored_bits(model: nn.Module) -> int:
    """Bits of all compressed layers of `model`, counted from what they hold: codes, scales and biases."""
    layers = [module for module in model.modules() if isinstance(module, CompressedLayer)]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return sum(sum(layer.laid.bits().values()) for layer in layers) + sum(8 * bias.nbytes for bias in biases)


def whole_bits(model: nn.Module) -> int:
    """Bits of everything that a file of `model` holds: compressed layers, dense ones, norms with their statistics."""
    return sum(8 * tensor.nbytes for tensor in model.state_dict().values())


def _described(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str, list[int]]]:
    """Name, dtype and shape of every tensor that settings describe."""
    found: list[tuple[str, str, list[int]]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and "tensor" in value:
            found.append((prefix + name, value["tensor"][0], value["tensor"][1]))
        elif isinstance(value, Mapping) and "kind" in value:
            found += _described(value, f"{prefix}{name}.")
        elif isinstance(value, Mapping) and "parts" in value:
            for index, part in enumerate(value["parts"]):
                found += _described(part, f"{prefix}{name}.{index}.")
    return found
