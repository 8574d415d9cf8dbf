"""A language model that is evaluated one block at a time: its memory is one block, the embeddings, and the hidden states."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.core.errors import InputError
from fewbits.export.checkpoint import is_checkpoint, read_layers, read_tables
from fewbits.models.adapter import Adapter
from fewbits.models.source import ModelSource, open_model
from fewbits.pipeline.capture import Capture
from fewbits.pipeline.last_states import LastStates, Replacements


class ModelFromStates(nn.Module):
    """The logits of `windows`, from the hidden states `[count, length, features]` behind the last block of a model.

    `wrapped`: whether the last block returns a tuple. Called with the batches of the windows in their order; raises InputError
    for other tokens.
    """

    capture: Capture

    def __init__(self, windows: Tensor, capture: Capture, hidden: Tensor, wrapped: bool) -> None:
        super().__init__()
        self.windows, self.position, self.hidden, self.wrapped = windows, 0, hidden, wrapped
        self.__dict__["capture"] = capture  # it holds the shell, whose parameters are not this module's to move

    @classmethod
    def of(cls, source: ModelSource, windows: Tensor, states: tuple[Tensor, bool], dtype: torch.dtype = torch.float32) -> ModelFromStates:
        """The dense model in `source`, of whose blocks none is read; `states` are the hidden ones and whether they were wrapped."""
        shell = source.shell()
        capture = Capture(shell, source, Adapter(shell).blocks, dtype)
        _load_rest(source, shell, dtype)
        return ModelFromStates(windows, capture, *states)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        """An object with `logits [sequences, tokens, vocabulary]`."""
        end = self.position + len(input_ids)
        if not torch.equal(self.windows[self.position : end], input_ids):
            raise InputError("a streamed model gives the logits of its own windows, in their order, and once unless it is rewound")
        final = self.hidden[self.position : end]
        self.position = end
        return SimpleNamespace(logits=self.capture.logits(input_ids, final, self.wrapped))

    def rewind(self) -> None:
        """Give the logits of the windows anew, from the first on; nothing but the head is computed again."""
        self.position = 0


class StreamedModel(ModelFromStates):
    """Called with the batches of `windows` in their order, gives the logits that the whole model would give.

    Only the last block's outputs are kept. `memory` gives the size of a
    stack, as in `read_layers`. Of a dense model some parts may be replaced. Raises InputError for a model that predicts no
    tokens, or a call with other tokens.
    """

    def __init__(
        self,
        model: str | Path,
        windows: Tensor,
        *,
        batch_size: int = 4,
        dtype: torch.dtype = torch.float32,
        memory: int | str | None = None,
        replaced: Replacements | None = None,
    ) -> None:
        source = open_model(model)
        if source.is_encoder:
            raise InputError(f"{str(model)!r} is an encoder, which predicts no tokens")
        if replaced is None and is_checkpoint(source.path):
            replaced = Replacements(lambda block: read_layers(source.path, block, memory), tables=read_tables(source.path))
        replaced = replaced or Replacements()
        states = LastStates.of(source, (windows, None), replaced, batch_size=batch_size, dtype=dtype)
        _load_rest(source, states.capture.shell, dtype)
        super().__init__(windows, states.capture, states.hidden, states.wrapped)


def _load_rest(source: ModelSource, shell: nn.Module, dtype: torch.dtype) -> None:
    """What is outside the blocks: embeddings, the last norm, the head."""
    shell.tie_weights()  # type: ignore[operator]  # a head that shares the embedding is in no file
    source.load_module(shell, "", dtype)
