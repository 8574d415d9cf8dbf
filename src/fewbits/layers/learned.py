"""A linear layer whose compressed weight is still being learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.layers.linear import StoredLinear


class LearnedLinear(nn.Module, ABC):
    """Stands in for a linear layer while its block is trained; what it is made of depends on shapes alone, not on values.

    Its parameters are what is learned, its buffers what is fixed; together they are its whole state.
    """

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @abstractmethod
    def weight(self) -> Tensor:
        """The matrix [out, in] that the layer computes with now, differentiable in what is learned."""

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """What is learned, as the optimizer's groups: each with `params` and `lr`."""

    @abstractmethod
    def finish(self) -> StoredLinear:
        """What is stored; its weight is the one that `weight` gives at the end."""

    def advance(self, progress: float, leaving: bool) -> None:
        """Called before each step; `progress` runs from 0 to 1 in a window, `leaving`: the block is not trained again after it."""

    def penalty(self) -> Tensor:
        """Added to the loss of each step."""
        return torch.zeros(())

    def harden(self) -> None:
        """Called when training is over: choices that were soft are made."""

    def round_inputs(self, inputs: Tensor) -> Tensor:
        """Inputs as the stored layer will read them."""
        return inputs

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight().to(inputs.dtype)
        return nn.functional.linear(self.round_inputs(inputs), weight, None if self.bias is None else self.bias.to(inputs.dtype))
