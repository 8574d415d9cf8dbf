"""What a model is made of, found by structure: its blocks in order and the linears in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fewbits.core.errors import InputError

LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Adapter:
    """A view of `model`; nothing is changed or hung on it."""

    model: nn.Module

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Names of the repeated blocks, first to last: the list of like modules that holds most of the linears.

        Raises InputError where the model repeats nothing.
        """
        lists = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
        }
        best = max(lists, key=lambda name: _linear_count(lists[name]), default=None)
        if best is None or _linear_count(lists[best]) == 0:
            raise InputError(f"{type(self.model).__name__} has no list of repeated blocks with linear layers in them")
        return tuple(f"{best}.{index}" for index in range(len(lists[best])))

    def linears(self, block_name: str) -> dict[str, nn.Module]:
        """Every linear layer of a block by its full name; `weight_matrix` gives its weight."""
        block = self.model.get_submodule(block_name)
        return {f"{block_name}.{name}": module for name, module in block.named_modules() if isinstance(module, LINEAR)}

    @cached_property
    def kept(self) -> dict[str, str]:
        """Full name and reason for every matrix that stays as it is: what a report must name."""
        inside = {name for block in self.blocks for name in self.linears(block)}
        reasons = {}
        for name, module in self.model.named_modules():
            own = {key: parameter for key, parameter in module.named_parameters(recurse=False) if parameter.ndim >= 2}
            if not own or name in inside:
                continue
            if isinstance(module, nn.Embedding):
                reasons[name] = "embedding"
            elif isinstance(module, LINEAR):
                reasons[name] = "linear layer outside the blocks"
            else:
                reasons |= {
                    f"{name}.{key}": f"{parameter.ndim}-dimensional parameter of {type(module).__name__}" for key, parameter in own.items()
                }
        return reasons


def weight_matrix(linear: nn.Module) -> Tensor:
    """The weight `[out, in]` of a linear layer; GPT-2's layers store the transpose."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return oriented(linear, weight)


def oriented(linear: nn.Module, matrix: Tensor) -> Tensor:
    """`matrix`, of the shape of the layer's parameter, as `[out, in]`."""
    return matrix.T if isinstance(linear, Conv1D) else matrix


def _linear_count(module: nn.Module) -> int:
    return sum(isinstance(child, LINEAR) for child in module.modules())
