"""Which linears of a block read the very same tensor, and what is gathered about it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fewbits.core.errors import InputError
from fewbits.core.method import Accumulator, Statistics
from fewbits.models.adapter import weight_matrix
from fewbits.pipeline.feed import Feed


class _AllHeard(Exception):
    """Ends a forward when the last group's inputs have come: what follows is not needed."""


class SharedInputs:
    """Hooks on `linears` that find those which read the very same tensor, and gather one `Statistics` for each such group.

    `mask` says which tokens of the coming batch are real, bool `[sequences, tokens]`; None: all of them.
    """

    def __init__(self, linears: Mapping[str, nn.Module], needs: Sequence[type[Accumulator]]) -> None:
        self.linears, self.needs = linears, needs
        self.mask: Tensor | None = None
        # One tensor is told from a later one at the same place in memory by being alive still.
        self._seen: list[tuple[weakref.ref[Tensor], list[str]]] = []
        self._statistics: dict[str, Statistics] = {}
        self._calls = 0  # of linears, in the first batch
        self._awaited: set[str] | None = None  # first readers that a forward which may end early has not come to yet
        self._hooks = [linear.register_forward_pre_hook(self._first(name)) for name, linear in linears.items()]

    def settle(self) -> None:
        """After the first batch the groups are known: from now on a group's first reader alone is listened to.

        Linears that were not called, as experts that no token was sent to, become groups of their own.
        """
        called = {name for names in self._groups() for name in names}
        self._once = len(called) == self._calls == len(self.linears)
        self._seen += [(weakref.ref(torch.empty(0)), [name]) for name in self.linears if name not in called]
        self._remove_hooks()
        for names in self._groups():
            self._statistics.setdefault(names[0], self._empty(names[0]))
            self._hooks.append(self.linears[names[0]].register_forward_pre_hook(self._listen(names[0])))

    def hear(self, forward: Callable[[], Tensor]) -> None:
        """Runs `forward` once the groups are known, for what is heard alone: no further than the last group's first reader.

        Where a linear was not called exactly once in the first batch, nobody knows which call is the last, and it runs to its end.
        """
        self._awaited = {names[0] for names in self._groups()} if self._once else None
        with contextlib.suppress(_AllHeard):
            forward()
        self._awaited = None

    def close(self) -> dict[tuple[str, ...], Statistics]:
        """Groups of names, in the order of their first call, with what was gathered."""
        self._remove_hooks()
        return {tuple(names): self._statistics[names[0]] for names in self._groups()}

    def _groups(self) -> list[list[str]]:
        return [names for _, names in self._seen]

    def _first(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._calls += 1
            for seen, names in self._seen:
                alive = seen()
                if alive is not None and _same(alive, inputs[0]):
                    names.append(name)
                    return
            self._seen.append((weakref.ref(inputs[0]), [name]))
            self._statistics[name] = self._empty(name)
            self._add(name, inputs[0])

        return hook

    def _listen(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._add(name, inputs[0])
            if self._awaited is not None:
                self._awaited.discard(name)
                if not self._awaited:
                    raise _AllHeard

        return hook

    def _add(self, name: str, inputs: Tensor) -> None:
        tokens, weights = inputs.flatten(0, -2), None
        if self.mask is not None and len(tokens) == self.mask.numel():
            weights = self.mask.flatten().float()
        elif self.mask is not None and ".experts." not in name and not bool(self.mask.all()):
            # Experts get real tokens alone (SeparateExperts leaves the padding out); who else gathers tokens is not known.
            raise InputError(
                f"{name} reads {len(tokens)} of {self.mask.numel()} tokens; calibration windows without padding would be right"
            )
        statistics = self._statistics[name]
        statistics.tokens += len(tokens) if weights is None else int(weights.sum())
        for accumulator in statistics:
            if accumulator.by_sequence and inputs.ndim == 3:
                accumulator.update(inputs, None if weights is None else weights.view(inputs.shape[:2]))
            else:
                accumulator.update(tokens, weights)

    def _empty(self, name: str) -> Statistics:
        return Statistics(*(need(weight_matrix(self.linears[name]).shape[1]) for need in self.needs))

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _same(first: Tensor, second: Tensor) -> bool:
    return (first.data_ptr(), first.shape, first.stride()) == (second.data_ptr(), second.shape, second.stride())


def assume_nothing(statistics: Statistics) -> None:
    """What is said of a layer that saw no token: its inputs are all alike and uncorrelated. The record counts it."""
    for accumulator in statistics:
        accumulator.update(torch.eye(accumulator.features))


def gather_inputs(
    feed: Feed, blocks: Sequence[str], linears: Mapping[str, nn.Module], needs: Iterable[type[Accumulator]], hidden: Tensor, keep: bool
) -> tuple[list[Tensor], dict[tuple[str, ...], Statistics]]:
    """Runs neighbouring `blocks` once on `hidden`: their outputs where they are to be kept, and statistics of every group of `linears`.

    The first batch shows which linears read one tensor; each group's statistics are taken once, when its first reader is called.
    """
    groups = SharedInputs(linears, sorted(set(needs), key=lambda need: need.__name__))
    outputs = []
    for number, batch in enumerate(hidden.split(feed.options.batch_size)):
        groups.mask = feed.batch_mask(number)
        run = partial(feed.run, blocks, batch, number)
        if keep:
            outputs.append(run())
        elif number:
            groups.hear(run)
        else:
            run()
        if number == 0:
            groups.settle()
    return outputs, groups.close()
