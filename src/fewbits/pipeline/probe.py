"""A whole model in memory that runs from any block on, with some of its weights replaced for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewbits.core.errors import BrokenModelError, InputError
from fewbits.models.adapter import Adapter, weight_matrix
from fewbits.models.source import ModelSource
from fewbits.pipeline.capture import BlockCall, Capture
from fewbits.pipeline.whole import divergence


class ModelProbe:
    """Remembers what the dense model gives to each block for `windows [count, length]`, so that only what follows a change is run.

    Memory: the model in `dtype` and all blocks' inputs. Raises InputError for an encoder or for padded windows, BrokenModelError
    where a weight of a linear layer is not finite.
    """

    @torch.no_grad()
    def __init__(
        self, source: ModelSource, windows: Tensor, mask: Tensor | None = None, *, batch_size: int = 4, dtype: torch.dtype = torch.float32
    ) -> None:
        if source.is_encoder:
            raise InputError(f"{source.name!r} is an encoder: it predicts no tokens, so no loss can be measured; a language model would do")
        if mask is not None and not bool(mask.all()):
            raise InputError(
                "losses are measured on whole windows; documents of their own with padding are not taken: leave --separate out"
            )
        self.source, self.windows, self.batch_size, self.dtype = source, windows, batch_size, dtype
        shell = source.shell()
        adapter = Adapter(shell)
        self.blocks = adapter.blocks
        self.linears = {name: adapter.linears(name) for name in self.blocks}
        self.capture = Capture(shell, source, self.blocks, dtype)
        runs = [self.capture.run(batch, None) for batch in self._batches()]
        self._calls: list[dict[str, BlockCall]] = [calls for _, calls in runs]
        for name in self.blocks:
            source.load_detached(shell, self.block(name), name, dtype)
        shell.tie_weights()  # a head that shares the embedding is in no file
        source.load_module(shell, "", dtype)
        self._check()
        self._states = [[hidden for hidden, _ in runs]]
        self._wrapped = isinstance(self._calls[0][self.blocks[-1]].call(self.block(self.blocks[-1]), runs[0][0]), tuple)
        for name in self.blocks:
            calls = [call[name] for call in self._calls]
            self._states.append([call.run(self.block(name), hidden) for call, hidden in zip(calls, self._states[-1], strict=True)])

    def __reduce__(self) -> Any:
        """Another process reads the model itself, once for all that asks for the same windows."""
        return _opened_again, (self.source, tuple(map(tuple, self.windows.tolist())), self.batch_size, self.dtype)

    def block(self, name: str) -> nn.Module:
        return self.capture.hollow[name]

    def block_of(self, layer: str) -> int:
        """The number of the block that holds a layer or a parameter."""
        return next(index for index, name in enumerate(self.blocks) if layer.startswith(f"{name}."))

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter inside a block, by its full name."""
        block = self.blocks[self.block_of(name)]
        return self.block(block).get_parameter(name.removeprefix(f"{block}."))

    def states(self, block: int) -> Tensor:
        """What enters block number `block`, `[windows, length, features]`; one past the last: what it returns, before the final norm."""
        return torch.cat(self._states[block])

    @contextlib.contextmanager
    def changed(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Parameters of blocks by full name have other values inside the context; afterwards they are the very same tensors again."""
        kept: dict[str, Tensor] = {}
        try:
            for name, value in values.items():
                parameter = self.parameter(name)
                kept[name] = parameter.data
                parameter.data = value.to(parameter.dtype).contiguous()
            yield
        finally:
            for name, value in kept.items():
                self.parameter(name).data = value

    @contextlib.contextmanager
    def replaced(self, layer: str, module: nn.Module) -> Iterator[None]:
        """`module` stands in the place of a linear layer inside the context."""
        name = self.blocks[self.block_of(layer)]
        block, inner = self.block(name), layer.removeprefix(f"{name}.")
        before = block.get_submodule(inner)
        block.set_submodule(inner, module)
        try:
            yield
        finally:
            block.set_submodule(inner, before)

    def logits(self, first: int = 0, without: Collection[str] = ()) -> Iterator[Tensor]:
        """Batches of logits `[sequences, length, vocabulary]` as the model is now; blocks before `first` are taken to be unchanged.

        The blocks named `without` are left out: what enters them leaves them.
        """
        for number, tokens in enumerate(self._batches()):
            hidden = self._states[first][number]
            for name in self.blocks[first:]:
                if name not in without:
                    hidden = self._calls[number][name].run(self.block(name), hidden)
            yield self.capture.logits(tokens, hidden, self._wrapped)

    def losses(self, first: int = 0, without: Collection[str] = ()) -> Tensor:
        """The next token's mean loss in nats of each window, float64 `[windows]`."""
        return torch.cat(list(self.batch_losses(first, without)))

    def batch_losses(self, first: int = 0, without: Collection[str] = ()) -> Iterator[Tensor]:
        """`losses` batch by batch, so that gradients need no more than a batch's memory."""
        for tokens, logits in zip(self._batches(), self.logits(first, without), strict=True):
            every = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            yield every.view(len(tokens), -1).double().mean(1)

    @cached_property
    def dense_losses(self) -> Tensor:
        """`losses` of the model as it was opened."""
        return self.losses(len(self.blocks))

    def divergence(self, first: int = 0) -> float:
        """KL(dense model || model as it is now), nats, the mean over all tokens."""
        total = 0.0
        for tokens, dense, now in zip(self._batches(), self.logits(len(self.blocks)), self.logits(first), strict=True):
            total += len(tokens) * float(divergence(dense, now))
        return total / len(self.windows)

    def _batches(self) -> tuple[Tensor, ...]:
        return cast(tuple[Tensor, ...], self.windows.split(self.batch_size))

    def _check(self) -> None:
        for linears in self.linears.values():
            for name, linear in linears.items():
                if not bool(torch.isfinite(weight_matrix(linear)).all()):
                    raise BrokenModelError(f"{name}: the weight is not finite; the model file is broken")


@lru_cache(maxsize=1)
def _opened_again(source: ModelSource, windows: tuple[tuple[int, ...], ...], batch_size: int, dtype: torch.dtype) -> ModelProbe:
    return ModelProbe(source, torch.tensor(windows), batch_size=batch_size, dtype=dtype)
