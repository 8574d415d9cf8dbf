"""A frozen linear layer with a low-rank addition in training (LoRA, arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AdaptedLinear(nn.Module):
    """y = W x + b + (alpha / rank) up down dropout(x); `down [rank, in]` and `up [out, rank]` are trained, up starts at zero."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rank: int, *, alpha: float = 16.0, dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        rows, columns = weight.shape
        rank = min(rank, rows, columns)
        self.scaling, self.dropout = alpha / rank, dropout
        self.frozen = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        bound = columns**-0.5  # Kaiming's uniform bound with a = sqrt(5), as in the official LoRA
        generator = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter((torch.rand(rank, columns, generator=generator) * 2 - 1) * bound)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def merged(self) -> Tensor:
        """float32 `[out, in]`: the one matrix that does the same without dropout."""
        return self.frozen.float() + self.scaling * (self.up @ self.down).detach()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = nn.functional.linear(inputs, self.frozen, self.bias)
        dropped = nn.functional.dropout(inputs, self.dropout, self.training)
        return outputs + self.scaling * nn.functional.linear(nn.functional.linear(dropped, self.down), self.up)
