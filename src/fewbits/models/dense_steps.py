"""Dense linear layers of 16 bits in compressed models, such as heads: one vector is multiplied by the native kernel, which reads their
weight faster than torch does.

A layer that is taken becomes one of the class below, whose forward leaves everything else to its own. Names, parameters and what is
saved stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbits.kernels import dispatch, native
from fewbits.kernels.layout import plain

_OWN = nn.Linear


class Linear(nn.Linear):
    """y = W x, W and x in bfloat16, without bias: one vector by the kernel."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self._serves(input):
            found = dispatch.multiply(plain(self.weight), input)
            if found is not None:
                return found
        return super().forward(input)

    def _serves(self, inputs: Tensor) -> bool:
        one = type(inputs) is Tensor and inputs.numel() == inputs.shape[-1] == self.in_features
        usual = self.bias is None and self.weight.dtype == inputs.dtype == torch.bfloat16 and self.weight.is_cpu
        return one and usual and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def multiply_natively(model: nn.Module) -> int:
    """Have `model`'s dense linear layers of bfloat16 multiply one vector by the kernel from now on; how many layers that are."""
    if not native.available():
        return 0
    layers = [module for module in model.modules() if type(module) in (_OWN, Linear) and _is_known(module)]
    for layer in layers:
        layer.__class__ = Linear
    return len(layers)


def multiply_by_itself(model: nn.Module) -> None:
    """Undoes `multiply_natively`."""
    layers: list[Any] = [module for module in model.modules() if type(module) is Linear]
    for layer in layers:
        layer.__class__ = _OWN


def _is_known(layer: nn.Module) -> bool:
    weight = layer.get_parameter("weight")
    return layer.bias is None and weight.dtype == torch.bfloat16 and weight.is_contiguous()
