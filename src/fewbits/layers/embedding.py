"""Tables whose rows are looked up, compressed: a model's embedding, and the output head that multiplies with the very same table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, cast

import torch
from torch import Tensor, nn

from fewbits.layers.linear import CompressedLayer, StoredLinear


class CompressedEmbedding(CompressedLayer[StoredLinear]):
    """Row i of W for every token i, times `scale`; only the rows that are asked for are decoded.

    `dtype` is what the rows are given in, as a dense embedding has it: it goes with the model's where that is cast.
    """

    def __init__(self, stored: StoredLinear, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
        super().__init__(stored)
        self.num_embeddings, self.embedding_dim = stored.weight.shape
        self.dtype, self.scale = dtype, scale

    @property
    def weight(self) -> Tensor:
        """The dense table [tokens, features], decoded anew: for looking at, not for computing with."""
        return self.stored.weight.decode(self.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens [...]`, integers, to `[..., features]`."""
        rows = self.laid.weight.taken(tokens.flatten().long()).decode(self.dtype)
        if self.scale != 1.0:
            rows = rows * torch.tensor(self.scale, dtype=self.dtype, device=rows.device)
        return rows.unflatten(0, tokens.shape)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings} x {self.embedding_dim}, {self.laid.weight.bits_per_weight():.3f} bits per weight"

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = function(torch.empty(0, dtype=self.dtype)).dtype
        return cast(Self, super()._apply(function, recurse))


class TiedHead(nn.Module):
    """y = W x + b with the W of an embedding, which is stored there and nowhere else: a head that shares its table."""

    def __init__(self, table: CompressedEmbedding, bias: Tensor | None = None) -> None:
        super().__init__()
        self._tables = (table,)  # in a tuple: it is no part of this module, so that it is written and counted once
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = table.stored.weight.shape

    @property
    def table(self) -> CompressedEmbedding:
        """The embedding whose table this is."""
        return self._tables[0]

    @property
    def stored(self) -> StoredLinear:
        """What is stored of the table now."""
        return self.table.stored

    @property
    def weight(self) -> Tensor:
        """The dense matrix [out, in], decoded anew: for looking at, not for computing with."""
        return self.table.weight

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.table.laid.weight.matmul(inputs)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, the embedding's table"
