"""A linear layer whose weight is a compressed tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from fewbits.core.tensor import CompressedTensor, Part, from_stored

_SEPARATOR = "__"  # buffer names may not contain dots


@dataclass(frozen=True, eq=False)
class StoredLinear(Part, kind="linear"):
    """What is stored of a linear layer: its weight, and the quantizer of what the weight's terms read (a part with `apply`), if any."""

    weight: CompressedTensor
    activation: Part | None = None


class CompressedLinear(nn.Module):
    """y = W x + b, with rounded activations if so stored.

    The stored tensors are buffers, which keep their dtypes whatever dtype the model is cast to.
    """

    def __init__(self, stored: StoredLinear, bias: Tensor | None = None) -> None:
        super().__init__()
        self.settings = stored.settings()
        self.out_features, self.in_features = stored.weight.shape
        for name, tensor in stored.tensors().items():
            self.register_buffer(_SEPARATOR.join(name.split(".")), tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._remember(stored)

    @classmethod
    def empty(cls, settings: Mapping[str, Any], bias: Tensor | None = None) -> Self:
        """The layer that `settings` describe with tensors on the meta device, to be filled from a file."""
        tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, dtype, shape in _described(settings)}
        return cls(cast(StoredLinear, from_stored(settings, tensors)), bias)

    @property
    def stored(self) -> StoredLinear:
        """The value that the buffers hold now; made anew only after a buffer was replaced."""
        buffers = dict(self.named_buffers(recurse=False))
        if any(self._seen.get(name) is not tensor for name, tensor in buffers.items()):
            tensors = {".".join(name.split(_SEPARATOR)): tensor for name, tensor in buffers.items()}
            self._remember(cast(StoredLinear, from_stored(self.settings, tensors)))
        return self._stored[0]

    @property
    def weight(self) -> Tensor:
        """The dense matrix [out, in], decoded anew: for looking at, not for computing with."""
        return self.stored.weight.decode()

    def forward(self, inputs: Tensor) -> Tensor:
        stored = self.stored
        quantize = None if stored.activation is None else cast(Any, stored.activation).apply
        outputs = stored.weight.matmul(inputs, quantize)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.stored.weight.bits_per_weight():.3f} bits per weight"

    def _remember(self, stored: StoredLinear) -> None:
        self._seen = dict(self.named_buffers(recurse=False))
        self._stored = (stored,)  # in a tuple: what it holds are the buffers themselves

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves buffers between devices and refuses to change their dtype: scales in fp16 are what was measured."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = function(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        bias, self.bias = self.bias, None
        for name, buffer in list(self.named_buffers(recurse=False)):
            setattr(self, name, keep_dtype(buffer))
        if bias is not None:
            self.bias = nn.Parameter(function(bias.data), requires_grad=False)
        return self


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
