"""Some of the token vectors themselves, for losses that no moment gives."""

from typing import Self

import torch
from torch import Tensor

from fewbits.core.method import Accumulator
from fewbits.statistics.checks import checked_tokens


class Sample(Accumulator):
    """`inputs`, float32 `[512 or fewer, features]`: tokens drawn without putting back, the same ones every time.

    Every token gets a random number, and those of the smallest numbers are kept. Tokens of weight zero are left out.
    """

    size = 512

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.inputs, self._keys, self._seen = torch.empty(0, features), torch.empty(0), 0

    def update(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """`inputs [tokens, features]`. Raises NumericsError where one is not finite."""
        tokens = checked_tokens(inputs, self.features).float()
        keys = torch.rand(len(tokens), generator=torch.Generator().manual_seed(self._seen))
        self._seen += len(tokens)
        kept = slice(None) if weights is None else weights > 0
        self._keep(torch.cat([self.inputs, tokens[kept]]), torch.cat([self._keys, keys[kept]]))

    def merge(self, other: Self) -> None:
        self._keep(torch.cat([self.inputs, other.inputs]), torch.cat([self._keys, other._keys]))
        self._seen += other._seen

    def _keep(self, inputs: Tensor, keys: Tensor) -> None:
        order = torch.argsort(keys, stable=True)[: self.size]
        self.inputs, self._keys = inputs[order], keys[order]
