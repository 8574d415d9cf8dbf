"""What runs through a model's blocks: hidden states in batches, the blocks' other arguments, and where states are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewbits.core.errors import BrokenModelError, InputError, NumericsError
from fewbits.core.workers import ThisProcess, Workers
from fewbits.models.adapter import Adapter
from fewbits.models.experts import mark_padding
from fewbits.models.source import ModelSource
from fewbits.pipeline.capture import BlockCall, Capture
from fewbits.pipeline.store import Store
from fewbits.statistics.checks import is_finite

Progress = Callable[[int, int, str, float, float], None]  # block, blocks, what was done, its error, seconds left


@dataclass(frozen=True)
class StreamOptions:
    """How a run goes; only `inputs`, `dtype`, `fold` and `blocks` change its result."""

    inputs: Literal["propagated", "original"] | None = None  # what statistics see: compressed or dense predecessors; None: ask the method
    dtype: torch.dtype = torch.float32
    batch_size: int = 4  # sequences that run through a block together
    activations_on_disk: bool = False
    fold: bool = True  # move scales of the input into the norm before it, where there is one
    progress: Progress | None = field(default=None, compare=False)
    # Second moments of the layers' inputs that errors are measured with; None: those of the inputs that the method saw.
    moments: Callable[[str], Tensor | None] | None = field(default=None, compare=False)
    blocks: int | None = None  # only the first so many, and nothing that is done to the whole model: for estimates
    workers: Workers = field(default_factory=ThisProcess, compare=False)  # who solves layers, tries options, makes compared runs

    def __post_init__(self) -> None:
        if self.inputs not in (None, "propagated", "original"):
            raise InputError(f"inputs={self.inputs!r} is not known; 'propagated' or 'original' would be right")

    def __getstate__(self) -> dict[str, Any]:
        """What another process is sent: it reports to nobody and sends nothing on."""
        return self.__dict__ | {"progress": None, "moments": None, "workers": ThisProcess()}


class Feed:
    """Token `windows [count, length]` on their way through the blocks of a model's shell.

    `mask` says which tokens are real, bool of the same shape; padding belongs at the right. None: all of them.
    """

    def __init__(self, source: ModelSource, shell: nn.Module, windows: Tensor, mask: Tensor | None, options: StreamOptions) -> None:
        self.source, self.shell, self.options = source, shell, options
        self._every = Adapter(shell).blocks
        self.blocks = self._every[: options.blocks]
        if mask is not None and (mask.shape != windows.shape or not bool(mask.any(1).all())):
            raise InputError(f"a mask {list(mask.shape)} does not fit windows {list(windows.shape)} with a real token in each")
        self.windows, self.mask = windows, None if mask is None else mask.bool()
        self.shape = (*windows.shape, source.config.get_text_config().hidden_size)
        self.calls: dict[str, list[BlockCall]] = {name: [] for name in self.blocks}

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Tokens and their mask."""
        size = self.options.batch_size
        masks = [None] * -(-len(self.windows) // size) if self.mask is None else self.mask.split(size)
        yield from zip(self.windows.split(size), masks, strict=True)

    def first_inputs(self) -> Iterator[Tensor]:
        """Hidden states entering the first block; what every block is called with is remembered on the way.

        Raises BrokenModelError where they are not finite.
        """
        capture = Capture(self.shell, self.source, self._every, self.options.dtype)
        for tokens, mask in self.batches():
            hidden, called = capture.run(tokens, None if mask is None else mask.long())
            if not is_finite(hidden):
                raise BrokenModelError("the model's embeddings are not finite; the model file is broken")
            for name in self.blocks:
                self.calls[name].append(called[name])
            yield hidden
        capture.close()

    def forward(self, names: Sequence[str], hidden: Tensor) -> Iterator[Tensor]:
        """Batches of the outputs of the neighbouring blocks `names`, for the first one's inputs."""
        for number, batch in enumerate(hidden.split(self.options.batch_size)):
            yield self.run(names, batch, number)

    def run(self, names: Sequence[str], batch: Tensor, number: int) -> Tensor:
        """The outputs for batch `number`, or for any part of it where its sequences share their arguments."""
        mask = self.batch_mask(number)
        for name in names:
            block = self.shell.get_submodule(name)
            mark_padding(block, mask)
            batch = self.calls[name][number].run(block, batch)
        return batch

    def batch_mask(self, number: int) -> Tensor | None:
        size = self.options.batch_size
        return None if self.mask is None else self.mask[number * size : (number + 1) * size]

    def keep(self, store: Store, block: int, batches: Iterable[Tensor], stream: str = "") -> Tensor:
        """The inputs of `block`: a tensor in memory, or a memory-mapped file that no more than a batch of was in memory."""
        if self.options.activations_on_disk:
            store.write_activations(block, batches, stream)
            return self.kept(store, block, stream)
        hidden = torch.empty(self.shape, dtype=self.options.dtype)
        start = 0
        for batch in batches:
            hidden[start : start + len(batch)] = batch
            start += len(batch)
        if block:  # the first block's inputs are made again by every run
            store.write_activations(block, [hidden], stream)
        return hidden

    def kept(self, store: Store, block: int, stream: str = "") -> Tensor:
        """What `keep` left. Raises InputError where it is gone."""
        hidden = store.activations(block, self.shape, self.options.dtype, self.options.activations_on_disk, stream)
        if hidden is None:
            raise InputError(f"{store.folder} has lost the inputs of block {block}; start again with --fresh")
        return hidden


def finite(name: str, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same batches. Raises NumericsError with the block's name where one is not finite."""
    for batch in batches:
        if not is_finite(batch):
            raise NumericsError(f"{name}: the block's outputs are not finite after compression")
        yield batch
