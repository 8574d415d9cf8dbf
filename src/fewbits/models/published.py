"""How a model's published files call what transformers keeps otherwise: experts one by one, and modules by other names."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from fewbits.core.errors import InputError
from fewbits.models.experts import SeparateExperts

_STACKS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Published:
    """Of a model with experts, in the files' order.

    `parts`: a linear of the files, and of which linear of the model it is which rows (int64). `names`: what else the model's
    state has, and its name in the files.
    """

    parts: dict[str, tuple[str, Tensor]]
    names: dict[str, str]

    def of_layer(self, layer: str) -> list[str]:
        """Linears of the files that a module of the model with a weight is made of, in the order of its rows."""
        own = f"{layer}.weight"
        return self._pieces.get(layer) or [self.names.get(own, own).removesuffix(".weight")]

    def in_model(self, module: str) -> str:
        """The model's name of what the files call `module`, which is no expert."""
        own = f"{module}.weight"
        return self._ours.get(own, own).removesuffix(".weight")

    @cached_property
    def _pieces(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for part in sorted(self.parts, key=lambda part: int(self.parts[part][1][0])):
            found.setdefault(self.parts[part][0], []).append(part)
        return found

    @cached_property
    def _ours(self) -> dict[str, str]:
        return {theirs: ours for ours, theirs in self.names.items()}


def has_experts(shell: PreTrainedModel) -> bool:
    """Whether there are experts that transformers keeps in one tensor."""
    return any(isinstance(module, SeparateExperts) for module in shell.modules())


def published(shell: PreTrainedModel) -> Published:
    """What transformers' own rules for writing files say of `shell`, a model without weights whose experts are taken apart.

    The rules are given numbered rows in the place of weights, so that what comes out says where it came from. Raises InputError
    where they tear apart what is no stack of experts, or mix experts' rows.
    """
    stacks = _stacks(shell)
    state = shell.state_dict()
    others = [name for name in state if not name.startswith(tuple(f"{stack.name}." for stack in stacks))]
    marked = {stack.name: stack.numbered() for stack in stacks}
    marked |= {name: torch.tensor(-1 - number).expand(state[name].shape) for number, name in enumerate(others)}
    parts: dict[str, tuple[str, Tensor]] = {}
    names: dict[str, str] = {}
    for name, made in revert_weight_conversion(shell, marked).items():
        first = int(made[(0,) * made.ndim])
        if first >= 0:
            stack = stacks[bisect_right([one.start for one in stacks], first) - 1]
            parts[name.removesuffix(".weight")] = stack.expert(name, made)
            continue
        if others[-1 - first] in names:
            raise InputError(f"files hold {others[-1 - first]} in several pieces; a model with experts alone in pieces would be right")
        names[others[-1 - first]] = name
    return Published(parts, names)


@dataclass(frozen=True)
class _Stack:
    """Weights of experts that transformers keeps in one tensor `[experts, rows, columns]`; its rows are numbered from `start`."""

    name: str
    start: int
    experts: int
    rows: int  # of one expert

    def numbered(self) -> Tensor:
        """int64 `[experts, rows, 1]`: the number of every row; one column stands for all, as rules may copy what they are given."""
        return (self.start + torch.arange(self.experts * self.rows)).view(self.experts, self.rows, 1)

    def expert(self, name: str, made: Tensor) -> tuple[str, Tensor]:
        """Which expert's linear the rows of a file's tensor are of, and which of its rows."""
        lines = made.flatten() - self.start
        owners = lines // self.rows
        if made.shape != (len(lines), 1) or not bool((owners == owners[0]).all()):
            raise InputError(f"files hold {self.name} in {name} turned or mixed with others; experts by themselves would be right")
        return f"{self.name}.{int(owners[0])}", lines % self.rows


def _stacks(shell: PreTrainedModel) -> list[_Stack]:
    found: list[_Stack] = []
    for owner, module in shell.named_modules():
        for name in _STACKS if isinstance(module, SeparateExperts) else ():
            experts = getattr(module, name)
            start = found[-1].start + found[-1].experts * found[-1].rows if found else 0
            found.append(_Stack(f"{owner}.{name}", start, len(experts), experts[0].out_features))
    return found
