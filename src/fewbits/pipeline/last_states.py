"""The hidden states behind a model's last block: all windows go through one block, then through the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.models.adapter import Adapter
from fewbits.models.experts import mark_padding
from fewbits.models.source import ModelSource
from fewbits.models.vocabulary import place_compressed
from fewbits.pipeline.capture import Capture
from fewbits.pipeline.feed import finite


def _no_layers(block: str) -> Iterable[tuple[str, StoredLinear]]:
    return ()


@dataclass(frozen=True)
class Replacements:
    """What takes the place of a dense model's parts: linears by the block they are in, small parameters by full name.

    `tables` are those of embedding and head that are compressed, by full name.
    """

    layers: Callable[[str], Iterable[tuple[str, StoredLinear]]] = _no_layers
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    tables: Mapping[str, StoredLinear] = field(default_factory=dict)

    def place_tables(self, shell: nn.Module, dtype: torch.dtype) -> None:
        """Before anything of `shell` is loaded."""
        for name, stored in self.tables.items():
            place_compressed(shell, name, stored, dtype)

    def fill(self, source: ModelSource, shell: nn.Module, name: str, block: nn.Module, dtype: torch.dtype) -> None:
        """Give the block called `name`, which something stands in for in `shell`, its weights."""
        for layer, stored in self.layers(name):
            inner = layer.removeprefix(f"{name}.")
            block.set_submodule(inner, CompressedLinear(stored, cast("Tensor | None", block.get_submodule(inner).bias)))
        source.load_detached(shell, block, name, dtype)
        self.copy_parameters(block, f"{name}.")

    def copy_parameters(self, module: nn.Module, prefix: str = "") -> None:
        """Those that are parameters of the loaded `module`, whose own name and a dot is `prefix`."""
        for name, parameter in module.named_parameters():
            if f"{prefix}{name}" in self.parameters:
                parameter.data.copy_(self.parameters[f"{prefix}{name}"])


@dataclass(frozen=True)
class LastStates:
    """`hidden [windows, length, features]` of a model whose blocks are hollow again; `wrapped`: the last block returns a tuple."""

    capture: Capture
    hidden: Tensor
    wrapped: bool

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        source: ModelSource,
        text: tuple[Tensor, Tensor | None],
        replaced: Replacements,
        *,
        batch_size: int = 4,
        dtype: torch.dtype = torch.float32,
    ) -> LastStates:
        """Of the windows `[count, length]` in `text`, with the mask that tells padding from them, None: all is text.

        Memory is one block, the embedding, and the hidden states. Raises NumericsError with the block's name where states are not
        finite.
        """
        shell = source.shell()
        blocks = Adapter(shell).blocks
        replaced.place_tables(shell, dtype)
        capture = Capture(shell, source, blocks, dtype)
        masks = [None] * -(-len(text[0]) // batch_size) if text[1] is None else list(text[1].split(batch_size))
        pairs = zip(text[0].split(batch_size), masks, strict=True)
        runs = [capture.run(tokens, None if mask is None else mask.long()) for tokens, mask in pairs]
        hidden, calls = [states for states, _ in runs], [call for _, call in runs]
        wrapped = False
        for name in blocks:
            block = capture.hollow[name]
            replaced.fill(source, shell, name, block, dtype)
            outputs = []
            for call, states, mask in zip(calls, hidden, masks, strict=True):
                mark_padding(block, mask)
                returned = call[name].call(block, states)
                wrapped = isinstance(returned, (tuple, list))
                outputs.append(returned[0] if wrapped else returned)
            hidden = list(finite(name, outputs))
            block.to("meta")
        replaced.copy_parameters(shell)
        return cls(capture, torch.cat(hidden), wrapped)
