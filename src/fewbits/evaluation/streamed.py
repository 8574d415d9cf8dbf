"""A language model that is evaluated one block at a time: its memory is one block, the embeddings, and the hidden states."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewbits.core.errors import InputError
from fewbits.export.checkpoint import is_checkpoint, read_layers
from fewbits.layers.linear import CompressedLinear
from fewbits.models.adapter import Adapter
from fewbits.models.source import open_model
from fewbits.pipeline.capture import Capture
from fewbits.pipeline.feed import finite


class StreamedModel(nn.Module):
    """Called with the batches of `windows` in their order, gives the logits that the whole model would give.

    All windows go through one block, then through the next; only the last block's outputs are kept. `memory` gives the size of a
    stack, as in `read_layers`. Raises InputError for a model that predicts no tokens, or a call with other tokens.
    """

    capture: Capture

    def __init__(
        self,
        model: str | Path,
        windows: Tensor,
        *,
        batch_size: int = 4,
        dtype: torch.dtype = torch.float32,
        memory: int | str | None = None,
    ) -> None:
        super().__init__()
        source = open_model(model)
        if source.is_encoder:
            raise InputError(f"{str(model)!r} is an encoder, which predicts no tokens")
        self.windows, self.position = windows, 0
        shell = source.shell()
        blocks = Adapter(shell).blocks
        capture = Capture(shell, source, blocks, dtype)
        runs = [capture.run(batch, None) for batch in windows.split(batch_size)]
        hidden, calls = [states for states, _ in runs], [call for _, call in runs]
        self.wrapped = False
        with torch.no_grad():
            for name in blocks:
                block = capture.hollow[name]
                if is_checkpoint(source.path):
                    for layer, stored in read_layers(source.path, name, memory):
                        inner = layer.removeprefix(f"{name}.")
                        bias = cast("Tensor | None", block.get_submodule(inner).bias)
                        block.set_submodule(inner, CompressedLinear(stored, bias))
                source.load_detached(shell, block, name, dtype)
                self.wrapped = isinstance(calls[0][name].call(block, hidden[0]), tuple)
                outputs = (call[name].run(block, states) for call, states in zip(calls, hidden, strict=True))
                hidden = list(finite(name, outputs))
                block.to("meta")
        shell.tie_weights()  # a head that shares the embedding is in no file
        source.load_module(shell, "", dtype)
        self.hidden = torch.cat(hidden)
        self.__dict__["capture"] = capture  # it holds the shell, whose parameters are not this module's to move

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        """An object with `logits [sequences, tokens, vocabulary]`."""
        end = self.position + len(input_ids)
        if not torch.equal(self.windows[self.position : end], input_ids):
            raise InputError("a streamed model gives the logits of its own windows, in their order, and once")
        final = self.hidden[self.position : end]
        self.position = end
        return SimpleNamespace(logits=self.capture.logits(input_ids, final, self.wrapped))
