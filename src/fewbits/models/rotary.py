"""A model's rotary embedding of keys, forwards and backwards, from its own code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewbits.core.errors import InputError


@dataclass(frozen=True)
class Rotary:
    """`embedding(states, positions)` gives cosines and sines, `rotate(queries, keys, cosines, sines)` turns both."""

    embedding: nn.Module
    rotate: Callable[..., tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, model: nn.Module) -> Rotary:
        """What `model` uses in all its layers.

        Raises InputError where there is no rotary embedding, more than one, or one that its own negative angles do not undo.
        """
        found = [module for name, module in model.named_modules() if hasattr(module, "inv_freq")]
        rotate = [getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None) for module in found]
        if len(found) != 1 or rotate[0] is None:
            raise InputError(
                f"{type(model).__name__} has {len(found)} rotary embeddings that are known; keys as they were before one need one"
            )
        rotary = cls(found[0], rotate[0])
        if getattr(found[0], "rope_type", "default") in ("dynamic", "longrope"):
            raise InputError(
                f"{type(model).__name__}: the angles of its rotary embedding change with the length, so that keys cannot be turned back"
            )
        rotary._check()
        return rotary

    def _check(self) -> None:
        width = 2 * cast(Tensor, self.embedding.inv_freq).numel()
        keys = torch.randn(1, 1, 5, width, generator=torch.Generator().manual_seed(0))
        positions = torch.arange(3, 8)[None]
        if not torch.allclose(self.undo(self.apply(keys, positions), positions), keys, atol=1e-4):
            raise InputError(
                "the model's rotary embedding is not undone by its own negative angles; a method with rotated keys would be right"
            )

    def apply(self, keys: Tensor, positions: Tensor) -> Tensor:
        """`keys [batch, heads, tokens, head_dim]` as the attention reads them at `positions [batch, tokens]`."""
        cosines, sines = self._angles(keys, positions)
        return self.rotate(keys, keys, cosines, sines)[1]

    def undo(self, keys: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `apply`."""
        cosines, sines = self._angles(keys, positions)
        # Scaled rotary types multiply both by one factor, which comes in squared here.
        scale = float(getattr(self.embedding, "attention_scaling", 1.0))
        return self.rotate(keys, keys, cosines / scale**2, -sines / scale**2)[1]

    def _angles(self, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return cast(Any, self.embedding)(keys, positions.long())
