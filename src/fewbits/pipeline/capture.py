"""The first block's inputs and the other arguments of every block, taken from one run of the base model with hollow blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.core.errors import InputError


class _LastBlockReached(Exception):
    """Ends the base model's forward: what follows the blocks is not needed."""


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with, besides its hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's new hidden states, of the shape of `hidden [sequences, tokens, features]`."""
        outputs = self.call(block, hidden)
        return outputs[0] if isinstance(outputs, (tuple, list)) else outputs

    def call(self, block: nn.Module, hidden: Tensor) -> Any:
        """What the block itself returns."""
        return block(hidden, *self.arguments, **self.keywords)


class _Recorder(nn.Module):
    """Stands in for a block: notes how it is called and returns the first block's hidden states unchanged."""

    def __init__(self, block: nn.Module, seen: list[Tensor], last: bool) -> None:
        super().__init__()
        # Not registered as a submodule: a hollow block has no weights to load.
        self.__dict__["hollow"] = block
        self.seen, self.last = seen, last
        self.call: BlockCall | None = None
        self.result: Any = None  # what the last block is to return in place of ending the forward

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["hollow"], name)  # models read attributes such as attention_type

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        if arguments:
            hidden, arguments = arguments[0], arguments[1:]
        else:
            hidden = keywords.pop("hidden_states")
        if not self.seen:
            self.seen.append(hidden)
        self.call = BlockCall(tuple(arguments), dict(keywords))
        if self.last:
            if self.result is not None:
                return self.result  # type: ignore[no-any-return]
            raise _LastBlockReached
        # The first block's states, not those received: some models take outputs[0] and so would lose an axis a block.
        return self.seen[0]


class Capture:
    """Runs the base model on batches of tokens; equal arguments of different batches and blocks are kept once."""

    def __init__(self, shell: nn.Module, source: Any, blocks: Sequence[str], dtype: torch.dtype) -> None:
        self.shell, self.names = shell, tuple(blocks)
        self.hollow = {name: shell.get_submodule(name) for name in self.names}
        self._kept: dict[tuple[Any, ...], list[Tensor]] = {}
        self._seen: list[Tensor] = []
        last = self.names[-1]
        self.recorders = {name: _Recorder(block, self._seen, name == last) for name, block in self.hollow.items()}
        for name, recorder in self.recorders.items():
            shell.set_submodule(name, recorder)
        prefix = getattr(shell, "base_model_prefix", "")
        self.base_name = prefix if prefix and isinstance(getattr(shell, prefix, None), nn.Module) else ""
        source.load_module(shell, self.base_name, dtype=dtype)

    def run(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[str, BlockCall]]:
        """Hidden states [sequences, tokens, features] entering the first block, and each block's call, for one batch."""
        base = self.shell.get_submodule(self.base_name)
        keywords = {} if mask is None else {"attention_mask": mask}
        self._seen.clear()
        with contextlib.suppress(_LastBlockReached):
            base(input_ids=tokens, use_cache=False, **keywords)
        calls = {}
        for name, recorder in self.recorders.items():
            if recorder.call is None:
                raise InputError(f"{name}: the model never called this block, so it cannot be compressed block by block")
            calls[name] = BlockCall(self._intern(recorder.call.arguments), self._intern(recorder.call.keywords))
            recorder.call = None
        return self._seen[0].detach(), calls

    def logits(self, tokens: Tensor, final: Tensor, wrapped: bool) -> Tensor:
        """What the model says of `tokens` where its last block returns `final` (in a tuple if `wrapped`); the shell must be loaded."""
        last = self.recorders[self.names[-1]]
        self._seen.clear()
        last.result = (final,) if wrapped else final
        try:
            return self.shell(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]
        finally:
            last.result = None

    def close(self) -> None:
        """Put the blocks back and release the embeddings."""
        self.shell.get_submodule(self.base_name).to("meta")
        for name, block in self.hollow.items():
            self.shell.set_submodule(name, block)
        self._seen.clear()

    def _intern(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            alike = self._kept.setdefault((value.shape, value.dtype, value.device), [])
            for kept in alike:
                if torch.equal(kept, value):
                    return kept
            alike.append(value.detach())
            return alike[-1]
        if isinstance(value, dict):
            return {key: self._intern(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._intern(item) for item in value)
        return value
