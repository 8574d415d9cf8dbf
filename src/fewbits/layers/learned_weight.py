"""A convolution or a linear layer whose weight is made anew for each batch, while the whole model is trained."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fewbits.core.tensor import CompressedTensor
from fewbits.layers.conv import CompressedConv2d, StoredConv2d
from fewbits.layers.linear import CompressedLinear, StoredLinear

Layer = nn.Conv2d | nn.Linear


class LearnedWeight(nn.Module, ABC):
    """Stands in for `layer`: the same strides, padding and bias, with the weight that `matrix` gives."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.size = layer.weight.shape
        self.layer = copy.deepcopy(layer)
        self.layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)  # it only says how a weight is used

    @abstractmethod
    def matrix(self) -> Tensor:
        """The weight that the layer computes with now, `[out, in / groups * kernel positions]`, differentiable in what is learned."""

    @abstractmethod
    def tensor(self) -> CompressedTensor:
        """What is stored of it."""

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.matrix().view(self.size).to(inputs.dtype)
        outputs: Tensor = functional_call(self.layer, {"weight": weight}, (inputs,))
        return outputs

    @torch.no_grad()
    def finish(self) -> CompressedConv2d | CompressedLinear:
        """The layer that computes with what is stored; the bias stays as it is."""
        bias = None if self.layer.bias is None else self.layer.bias.detach().clone()
        if isinstance(self.layer, nn.Conv2d):
            return CompressedConv2d(StoredConv2d.like(self.layer, self.tensor()), bias)
        return CompressedLinear(StoredLinear(self.tensor()), bias)


def filters(layer: Layer) -> Tensor:
    """The layer's weight as a float32 matrix `[out, in / groups * kernel positions]`."""
    return layer.weight.detach().float().flatten(1)
