"""A convolution whose filters, laid out as a matrix, are a compressed tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, Part
from fewbits.layers.linear import CompressedLayer


@dataclass(frozen=True, eq=False)
class StoredConv2d(Part, kind="conv2d"):
    """What is stored of a convolution: its filters as a matrix `[out, in / groups * height * width]`, and how they move.

    `activation` rounds the images that it reads (a part with `apply`), None leaves them as they are. Raises InputError where
    the matrix does not hold whole filters.
    """

    weight: CompressedTensor
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"
    activation: Part | None = None

    def __post_init__(self) -> None:
        height, width = self.kernel
        rows, columns = self.weight.shape
        if columns % (height * width) or rows % self.groups:
            raise InputError(f"a matrix {[rows, columns]} does not hold filters {height} x {width} in {self.groups} groups")

    @classmethod
    def like(cls, conv: nn.Conv2d, weight: CompressedTensor, activation: Part | None = None) -> Self:
        """The filters `weight` moved as those of `conv` are; a depthwise convolution has as many groups as filters."""
        depthwise = conv.groups == conv.out_channels and conv.groups > 1
        groups = weight.shape[0] if depthwise else conv.groups
        height, width = conv.kernel_size
        stride, dilation = (conv.stride[0], conv.stride[1]), (conv.dilation[0], conv.dilation[1])
        padding = conv.padding if isinstance(conv.padding, str) else (conv.padding[0], conv.padding[1])
        return cls(weight, (height, width), stride, padding, dilation, groups, conv.padding_mode, activation)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[out, in / groups, height, width]."""
        rows, columns = self.weight.shape
        height, width = self.kernel
        return rows, columns // (height * width), height, width


class CompressedConv2d(CompressedLayer[StoredConv2d]):
    """y = W * x + b for `x [batch, channels, height, width]`."""

    decoded_at_each_call = True

    def __init__(self, stored: StoredConv2d, bias: Tensor | None = None) -> None:
        super().__init__(stored, bias)
        self.out_channels, inputs, *_ = stored.shape
        self.in_channels, self.groups = inputs * stored.groups, stored.groups
        self.kernel_size, self.stride, self.dilation = stored.kernel, stored.stride, stored.dilation
        # A plain convolution without weights knows how every kind of padding is done.
        with torch.device("meta"):
            shape = nn.Conv2d(1, 1, stored.kernel, padding=stored.padding, dilation=stored.dilation, padding_mode=stored.padding_mode)
        self._edges: list[int] = list(shape._reversed_padding_repeated_twice)

    @property
    def weight(self) -> Tensor:
        """The filters [out, in / groups, height, width], decoded anew: for looking at, not for computing with."""
        return self.stored.weight.decode().view(self.stored.shape)

    def forward(self, inputs: Tensor) -> Tensor:
        stored, padding = self.laid, self.laid.padding
        if stored.activation is not None:
            inputs = cast(Any, stored.activation).apply(inputs)
        if stored.padding_mode != "zeros":
            inputs, padding = nn.functional.pad(inputs, self._edges, mode=stored.padding_mode), (0, 0)
        weight = stored.weight.decode(inputs.dtype).view(stored.shape)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return nn.functional.conv2d(inputs, weight, bias, stored.stride, padding, stored.dilation, stored.groups)

    def extra_repr(self) -> str:
        bits = self.laid.weight.bits_per_weight()
        return f"{self.in_channels} -> {self.out_channels}, kernel {self.kernel_size}, {bits:.3f} bits per weight"
