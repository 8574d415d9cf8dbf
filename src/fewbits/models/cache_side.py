"""One side of a cache's layer: what of its keys, or of its values, is sealed, and what is exact yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbits.core.cache_method import Side
from fewbits.core.tensor import CompressedTensor


class SideState:
    """Keys, or values, of one layer: runs sealed for each sequence, then exact tokens `[batch, heads, tokens, head_dim]`."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.sealed: list[list[CompressedTensor]] = []  # by sequence; equally many tokens in each
        self.exact: Tensor | None = None

    @property
    def sealed_tokens(self) -> int:
        return sum(run.shape[0] for run in self.sealed[0]) if self.sealed else 0

    @property
    def tokens(self) -> int:
        return self.sealed_tokens + (0 if self.exact is None else self.exact.shape[2])

    def append(self, states: Tensor) -> None:
        if self.exact is None:
            self.exact, self.sealed = states, [[] for _ in range(len(states))]
        else:
            self.exact = torch.cat([self.exact, states], 2)

    def push(self, runs: Sequence[CompressedTensor]) -> None:
        """One run more for each sequence; neighbours of equal length become one, so that there are few, and few copies."""
        assert self.exact is not None
        self.exact = self.exact[:, :, runs[0].shape[0] :].clone()  # a view would keep the sealed tokens in memory
        for chain, run in zip(self.sealed, runs, strict=True):
            chain.append(run)
            while len(chain) > 1 and chain[-2].shape[0] <= chain[-1].shape[0]:
                joined = chain[-2].stacked(chain[-1])
                if joined is None:
                    break
                chain[-2:] = [joined]

    def choose(self, rows: Tensor) -> None:
        """Sealed runs are values: sequences that descend from one share its bytes."""
        if self.exact is not None:
            self.exact = self.exact.index_select(0, rows)
            self.sealed = [list(self.sealed[row]) for row in rows.tolist()]


def decode_together(runs: Sequence[CompressedTensor]) -> Tensor:
    """`[batch, tokens, channels]` of equally long runs: one call for all where they join, as a call costs more than a copy of codes."""
    joined: CompressedTensor | None = runs[0]
    for run in runs[1:]:
        joined = None if joined is None else joined.stacked(run)
    if joined is None:
        return torch.stack([run.decode() for run in runs])
    return joined.decode().view(len(runs), -1, joined.shape[1])
