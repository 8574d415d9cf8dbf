"""What is known of the tokens of a batch beside what they are: which of them are text, and at which positions."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


class Sequences:
    """What a model's forward says of the tokens of a batch, shared by the layers of one cache: positions, and padding at the left.

    Positions are kept where keys are to be `placed` anew when they are read, and a mask only while some token is padding.
    """

    def __init__(self, *, placed: bool) -> None:
        self.placed = placed
        self.reset()

    def reset(self) -> None:
        self.text: Tensor | None = None  # bool [batch, tokens], False: padding; None: all is text
        self.positions: Tensor | None = None  # int32 [batch, tokens]

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by what it is."""
        return {name: one for name, one in (("positions", self.positions), ("padding", self.text)) if one is not None}

    def observe(self, mask: Tensor | None, positions: Tensor | None, shape: tuple[int, int], seen: int) -> None:
        """A forward of `shape` (batch, new tokens) after `seen` tokens is about to run."""
        batch, fresh = shape
        padded = mask is not None and mask.ndim == 2 and mask.shape[1] == seen + fresh and not bool(mask.all())
        self.text = cast(Tensor, mask).bool() if padded else None
        if not self.placed:
            return
        if positions is None:
            positions = torch.arange(seen, seen + fresh)
        new = positions.reshape(-1, fresh).expand(batch, fresh).to(torch.int32)
        self.positions = new if self.positions is None or not seen else torch.cat([self.positions[:, :seen], new], 1)

    def padding(self, row: int) -> int:
        """Tokens at the left of a sequence that are no text."""
        return 0 if self.text is None else int((~self.text[row]).long().cumprod(0).sum())

    def choose(self, rows: Tensor) -> None:
        """The batch is now made of these of its sequences."""
        self.text = None if self.text is None else self.text[rows]
        self.positions = None if self.positions is None else self.positions[rows]
