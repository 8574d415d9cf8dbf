"""Experts that transformers keeps in one 3-dimensional parameter, taken apart into linear layers of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SeparateExperts(nn.Module):
    """The same function as the fused module: every token goes through its experts' gate, up and down projections.

    Expert e's layers are `gate_up_proj.e` and `down_proj.e`. Each sees its own tokens alone, so its statistics are its own.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        experts, inner, outer = fused.gate_up_proj.shape
        with torch.device(fused.gate_up_proj.device):
            self.gate_up_proj = nn.ModuleList(nn.Linear(outer, inner, bias=False) for _ in range(experts))
            self.down_proj = nn.ModuleList(nn.Linear(inner // 2, outer, bias=False) for _ in range(experts))
        self.act_fn = fused.act_fn
        self.real: Tensor | None = None  # bool [tokens]: those of the coming batch that are not padding; None: all

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden_states [tokens, features]`; `top_k_index` and `top_k_weights [tokens, experts per token]`."""
        total = torch.zeros_like(hidden_states)
        if self.real is not None:
            top_k_index = top_k_index.masked_fill(~self.real[:, None], -1)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            token, choice = torch.where(top_k_index == expert)
            if not len(token):
                continue
            gate, up = gate_up(hidden_states[token]).chunk(2, dim=-1)
            outputs = down(self.act_fn(gate) * up) * top_k_weights[token, choice, None]
            total.index_add_(0, token, outputs.to(total.dtype))
        return total


def separate_experts(model: nn.Module) -> None:
    """Replace every fused module of `model` whose parameters are a gate-and-up stack and a down stack and nothing else."""
    for name, module in list(model.named_modules()):
        if _is_fused(module):
            model.set_submodule(name, SeparateExperts(module))


def mark_padding(block: nn.Module, mask: Tensor | None) -> None:
    """Tell the experts in `block` which tokens of the coming batch are real."""
    for module in block.modules():
        if isinstance(module, SeparateExperts):
            module.real = None if mask is None else mask.flatten()


def _is_fused(module: Any) -> bool:
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    if set(shapes) != {"gate_up_proj", "down_proj"} or not hasattr(module, "act_fn") or any(len(shape) != 3 for shape in shapes.values()):
        return False
    (experts, inner, outer), down = shapes["gate_up_proj"], shapes["down_proj"]
    return down == (experts, outer, inner // 2) and inner != outer
