"""Compress a model one block at a time: weights are read when a block's turn comes and written as soon as it is done."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fewbits.core.errors import InputError, NumericsError
from fewbits.core.method import Accumulator, BlockMethod, LayerMethod, Method, Statistics
from fewbits.core.tensor import CompressedTensor
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.models.adapter import Adapter, weight_matrix
from fewbits.models.source import ModelSource
from fewbits.pipeline.capture import BlockCall, Capture
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.store import Store

Progress = Callable[[int, int, str, float, float], None]  # block, blocks, layer, its relative error, seconds left


@dataclass(frozen=True)
class StreamOptions:
    """How a run goes; only `inputs` and `dtype` change its result."""

    inputs: Literal["propagated", "original"] = "propagated"  # what a block's statistics see: compressed or dense predecessors
    dtype: torch.dtype = torch.float32
    batch_size: int = 8
    activations_on_disk: bool = False
    progress: Progress | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.inputs not in ("propagated", "original"):
            raise InputError(f"inputs={self.inputs!r} is not known; 'propagated' or 'original' would be right")


@dataclass(frozen=True)
class StreamSummary:
    """What a finished run left in its store."""

    store: Store
    blocks: int
    kept: Mapping[str, str]  # full name of every matrix that stays dense, with the reason

    def layers(self) -> Iterator[tuple[str, StoredLinear]]:
        """Every compressed linear by its full name, read one at a time."""
        for block in range(self.blocks):
            yield from self.store.layers(block)

    def record(self) -> dict[str, Any]:
        """JSON-able: bits with their breakdown, each layer's error, and what was kept dense."""
        layers: dict[str, Any] = {}
        for block in range(self.blocks):
            layers |= self.store.manifest(block)["layers"]
        breakdown: dict[str, int] = {}
        for layer in layers.values():
            for name, bits in layer["bits"].items():
                role = name.rpartition(".")[2]
                breakdown[role] = breakdown.get(role, 0) + bits
        weights = sum(layer["weights"] for layer in layers.values())
        return {
            "bits_per_weight": sum(breakdown.values()) / weights,
            "bits": breakdown,
            "compressed_weights": weights,
            "layers": layers,
            "silent": [name for name, layer in layers.items() if not layer["tokens"]],
            "kept": dict(self.kept),
        }


def compress_model(source: ModelSource, plan: Plan, windows: Tensor, work: Path, options: StreamOptions | None = None) -> StreamSummary:
    """Compress every linear of every block as `plan` says, on the token `windows [count, length]`.

    `work` holds what is finished; a run that was killed goes on from it and ends in the same bytes. Raises InputError where
    the folder belongs to other settings or most linear weights would stay dense, NumericsError with the layer's name where
    weights, activations or results are not finite.
    """
    run = _Run(source, plan, windows, work, options or StreamOptions())
    with torch.no_grad():
        run.compress_blocks()
    return StreamSummary(run.store, len(run.adapter.blocks), run.kept)


class _Run:
    def __init__(self, source: ModelSource, plan: Plan, windows: Tensor, work: Path, options: StreamOptions) -> None:
        self.source, self.plan, self.options = source, plan, options
        self.shell = source.shell()
        self.adapter = Adapter(self.shell)
        self.batches = windows.split(options.batch_size)
        self.shape = (*windows.shape, source.config.get_text_config().hidden_size)
        self.kept = dict(self.adapter.kept) | self._kept_by_plan()
        self.store = Store(work, self._settings(windows))

    def _settings(self, windows: Tensor) -> dict[str, Any]:
        """Everything that decides the result."""
        return {
            "model": self.source.fingerprint(),
            "plan": self.plan.describe(),
            "windows": [list(windows.shape), hashlib.sha256(windows.numpy().tobytes()).hexdigest()],
            "inputs": self.options.inputs,
            "dtype": str(self.options.dtype),
            "batch_size": self.options.batch_size,
            "threads": torch.get_num_threads(),
        }

    def _kept_by_plan(self) -> dict[str, str]:
        linears = {name: module for block in self.adapter.blocks for name, module in self.adapter.linears(block).items()}
        kept = {name: f"kept by the pattern {pattern!r}" for name in linears if (pattern := self.plan.keeps(name)) is not None}
        total = sum(weight_matrix(linear).numel() for linear in linears.values())
        left = sum(weight_matrix(linears[name]).numel() for name in kept)
        if 2 * left > total:
            raise InputError(f"the patterns {list(self.plan.keep)} keep {left} of {total} linear weights dense; keep less than half")
        return kept

    def compress_blocks(self) -> None:
        blocks, done = self.adapter.blocks, self.store.finished()
        if done == len(blocks):
            return
        hidden, calls = self._first_inputs()
        if done:
            kept = self.store.activations(done, self.shape, self.options.dtype, self.options.activations_on_disk)
            if kept is None:
                raise InputError(f"{self.store.folder} has lost the inputs of block {done}; start again with --fresh")
            hidden = kept
        began = time.monotonic()
        for index in range(done, len(blocks)):
            hidden = self._compress_block(index, hidden, calls[blocks[index]], began, done)

    def _first_inputs(self) -> tuple[Tensor, dict[str, list[BlockCall]]]:
        capture = Capture(self.shell, self.source, self.adapter.blocks, self.options.dtype)
        calls: dict[str, list[BlockCall]] = {name: [] for name in self.adapter.blocks}

        def states() -> Iterator[Tensor]:
            for batch in self.batches:
                hidden, called = capture.run(batch, None)
                for name, call in called.items():
                    calls[name].append(call)
                yield hidden

        hidden = self._keep(0, states())
        capture.close()
        return hidden, calls

    def _keep(self, block: int, batches: Iterable[Tensor]) -> Tensor:
        """The inputs of `block`: a tensor in memory, or a memory-mapped file that no more than a batch of was in memory."""
        if self.options.activations_on_disk:
            self.store.write_activations(block, batches)
            mapped = self.store.activations(block, self.shape, self.options.dtype, mapped=True)
            if mapped is None:
                raise InputError(f"{self.store.folder} has lost the inputs of block {block}; start again with --fresh")
            return mapped
        hidden = torch.cat(list(batches))
        if block:  # the first block's inputs are made again by every run
            self.store.write_activations(block, [hidden])
        return hidden

    def _compress_block(self, index: int, hidden: Tensor, calls: list[BlockCall], began: float, done: int) -> Tensor:
        name = self.adapter.blocks[index]
        self.source.load_module(self.shell, name, self.options.dtype)
        block = self.shell.get_submodule(name)
        linears = {n: linear for n, linear in self.adapter.linears(name).items() if self.plan.keeps(n) is None}
        for layer, linear in linears.items():
            if not bool(torch.isfinite(weight_matrix(linear)).all()):
                raise NumericsError(f"{layer}: the weight is not finite; the model file is broken")
        dense, stored, entries = self._solve(block, linears, hidden, calls)
        if self.options.inputs == "propagated":
            for layer, part in stored.items():
                self.shell.set_submodule(layer, CompressedLinear(part, cast(Tensor | None, linears[layer].bias)))
        if index + 1 < len(self.adapter.blocks):
            # The next inputs first: the block counts as done only when the run can go on from it.
            outputs = dense if self.options.inputs == "original" else self._forward(block, hidden, calls)
            hidden = self._keep(index + 1, _finite(name, outputs))
        self.store.write_block(index, stored, {"layers": entries})
        self.store.drop_activations(keep=index + 1)
        self.shell.set_submodule(name, nn.Identity())  # nothing of a finished block stays in memory
        self._report(index, entries, began, done)
        return hidden

    def _report(self, index: int, entries: Mapping[str, Any], began: float, done: int) -> None:
        if self.options.progress is not None:
            left = (time.monotonic() - began) / (index - done + 1) * (len(self.adapter.blocks) - index - 1)
            for layer, entry in entries.items():
                self.options.progress(index, len(self.adapter.blocks), layer, entry["relative_error"], left)

    def _forward(self, block: nn.Module, hidden: Tensor, calls: list[BlockCall]) -> Iterator[Tensor]:
        for call, batch in zip(calls, hidden.split(self.options.batch_size), strict=True):
            yield call.run(block, batch)

    def _solve(
        self, block: nn.Module, linears: Mapping[str, nn.Module], hidden: Tensor, calls: list[BlockCall]
    ) -> tuple[list[Tensor], dict[str, StoredLinear], dict[str, Any]]:
        """The block's dense outputs where they are asked for, its linears compressed, and what the manifest says of each."""
        outputs, gathered = self._gather(block, linears, hidden, calls)
        stored: dict[str, StoredLinear] = {}
        entries: dict[str, Any] = {}
        for group in list(gathered):
            statistics = gathered.pop(group)  # a group's statistics go as soon as it is solved
            if not statistics.tokens:
                _assume_nothing(statistics)
            moment = next((matrix for matrix in map(_second_moment, statistics) if matrix is not None), None)
            for method, names in self._by_method(group).items():
                weights = {name: weight_matrix(linears[name]).float().contiguous() for name in names}
                for name, tensor in _compress(method, weights, statistics).items():
                    stored[name] = StoredLinear(tensor, method.activation(statistics, tensor))
                    entries[name] = _entry(name, weights[name], stored[name], moment) | {"tokens": statistics.tokens}
        return outputs, {name: stored[name] for name in linears}, {name: entries[name] for name in linears}

    def _gather(
        self, block: nn.Module, linears: Mapping[str, nn.Module], hidden: Tensor, calls: list[BlockCall]
    ) -> tuple[list[Tensor], dict[tuple[str, ...], Statistics]]:
        """Runs the dense block once: statistics of every group of linears that read one tensor.

        The first batch shows which linears those are; each group's statistics are taken once, when its first reader is called.
        """
        needs = {need for name in linears for need in _layer_method(self.plan.method_for(name), name).needs}
        groups = SharedInputs(linears, sorted(needs, key=lambda need: need.__name__))
        outputs = []
        for number, output in enumerate(self._forward(block, hidden, calls)):
            if number == 0:
                groups.settle()
            if self.options.inputs == "original":
                outputs.append(output)
        return outputs, groups.close()

    def _by_method(self, group: tuple[str, ...]) -> dict[LayerMethod, list[str]]:
        chosen: dict[LayerMethod, list[str]] = {}
        for name in group:
            chosen.setdefault(_layer_method(self.plan.method_for(name), name), []).append(name)
        return chosen


class SharedInputs:
    """Hooks on `linears` that find those which read the very same tensor, and gather one `Statistics` for each such group."""

    def __init__(self, linears: Mapping[str, nn.Module], needs: Sequence[type[Accumulator]]) -> None:
        self.linears, self.needs = linears, needs
        # Inputs of the first batch are held, so that no later tensor can take the place of an earlier one in memory.
        self._held: dict[Any, Tensor] = {}
        self._names: dict[Any, list[str]] = {}
        self._statistics: dict[str, Statistics] = {}
        self._hooks = [linear.register_forward_pre_hook(self._first(name)) for name, linear in linears.items()]

    def settle(self) -> None:
        """After the first batch the groups are known: from now on a group's first reader alone is listened to.

        Linears that were not called, as experts that no token was sent to, become groups of their own.
        """
        called = {name for names in self._names.values() for name in names}
        self._names |= {name: [name] for name in self.linears if name not in called}
        self._held.clear()
        self._remove_hooks()
        for names in self._names.values():
            statistics = self._statistics.setdefault(names[0], self._empty(names[0]))
            self._hooks.append(self.linears[names[0]].register_forward_pre_hook(_listen(statistics)))

    def close(self) -> dict[tuple[str, ...], Statistics]:
        """Groups of names, in the order of their first call, with what was gathered."""
        self._remove_hooks()
        return {tuple(names): self._statistics[names[0]] for names in self._names.values()}

    def _first(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            key = (inputs[0].data_ptr(), inputs[0].shape, inputs[0].stride())
            if key not in self._held:
                self._held[key], self._names[key] = inputs[0], []
                self._statistics[name] = self._empty(name)
                _add(self._statistics[name], inputs[0])
            self._names[key].append(name)

        return hook

    def _empty(self, name: str) -> Statistics:
        return Statistics(*(need(weight_matrix(self.linears[name]).shape[1]) for need in self.needs))

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _listen(statistics: Statistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, inputs: _add(statistics, inputs[0])


def _add(statistics: Statistics, inputs: Tensor) -> None:
    tokens = inputs.flatten(0, -2)
    statistics.tokens += len(tokens)
    for accumulator in statistics:
        accumulator.update(tokens)


def _finite(name: str, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    for batch in batches:
        if not bool(torch.isfinite(batch).all()):
            raise NumericsError(f"{name}: the block's outputs are not finite after compression")
        yield batch


def _assume_nothing(statistics: Statistics) -> None:
    """What is said of a layer that saw no token: its inputs are all alike and uncorrelated. The record counts it."""
    for accumulator in statistics:
        accumulator.update(torch.eye(accumulator.features))


def _layer_method(method: Method | None, name: str) -> LayerMethod:
    if isinstance(method, BlockMethod) or not isinstance(method, LayerMethod):
        raise InputError(f"{name}: {type(method).__name__} does not compress single layers; a layer method such as gptq would be right")
    return method


def _compress(method: LayerMethod, weights: Mapping[str, Tensor], statistics: Statistics) -> dict[str, CompressedTensor]:
    try:
        return method.compress_group(weights, statistics)
    except NumericsError as error:
        raise NumericsError(f"{', '.join(weights)}: {error}") from error


def _entry(name: str, weight: Tensor, stored: StoredLinear, moment: Tensor | None) -> dict[str, Any]:
    difference = weight - stored.weight.decode()
    if not bool(torch.isfinite(difference).all()):
        raise NumericsError(f"{name}: the compressed weight is not finite")
    return {
        "weights": weight.numel(),
        "bits": stored.bits(),
        "relative_error": _relative_error(weight, difference, moment),
    }


def _relative_error(weight: Tensor, difference: Tensor, moment: Tensor | None) -> float:
    """Squared output error over squared output where a second moment was gathered, else the same of the weight."""
    if moment is None:
        return float(difference.square().sum() / weight.square().sum().clamp(min=1e-30))
    return float(((difference @ moment) * difference).sum() / ((weight @ moment) * weight).sum().clamp(min=1e-30))


def _second_moment(accumulator: Accumulator) -> Tensor | None:
    matrix = getattr(accumulator, "matrix", None)
    return matrix.float() if isinstance(matrix, Tensor) else None
