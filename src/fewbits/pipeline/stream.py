"""Compress a model one block at a time: weights are read when a block's turn comes and written as soon as it is done."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewbits.core.errors import BrokenModelError, InputError
from fewbits.core.method import Accumulator, BlockMethod, LayerMethod, Method, Statistics
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.models.adapter import Adapter, oriented, weight_matrix
from fewbits.models.source import ModelSource
from fewbits.models.weights import Weights
from fewbits.pipeline.dense_pass import DensePass
from fewbits.pipeline.entries import add_up, checked_linears, report
from fewbits.pipeline.feed import Feed, StreamOptions, finite
from fewbits.pipeline.fold import fold_scales
from fewbits.pipeline.gather import assume_nothing, gather_inputs
from fewbits.pipeline.gradients import SENSITIVITIES, keep_sensitivities
from fewbits.pipeline.memory import return_freed_memory
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.profile import RISES, keep_profile
from fewbits.pipeline.reconstruct import reconstruct_blocks
from fewbits.pipeline.restore import restored
from fewbits.pipeline.solve import GroupJob, solve_job
from fewbits.pipeline.stack import order_terms, stacking_of
from fewbits.pipeline.store import Store
from fewbits.pipeline.tables import Tables
from fewbits.pipeline.tune import tune_blocks

__all__ = ["StreamOptions", "StreamSummary", "compress_model", "run_settings"]
_CHOICES = "choices"


@dataclass(frozen=True)
class StreamSummary:
    """What a finished run left in its store."""

    store: Store
    blocks: int
    kept: Mapping[str, str]  # full name of every matrix that stays dense, with the reason
    order: tuple[str, ...] | None = None  # of the layers' terms after the first, where the method ranks them (pipeline/stack.py)
    parts: tuple[str, ...] = ()  # what the store calls what is compressed outside of the blocks (pipeline/tables.py)

    def layers(self) -> Iterator[tuple[str, StoredLinear]]:
        """Every compressed linear by its full name, read one at a time; embedding and head, where they are compressed, come last."""
        for block in (*range(self.blocks), *self.parts):
            yield from self.store.layers(block)

    def tables(self) -> dict[str, StoredLinear]:
        """Embedding and head by full name, where they are compressed."""
        return {name: stored for part in self.parts for name, stored in self.store.layers(part)}

    def replaced(self) -> dict[str, Tensor]:
        """New values of dense parameters, by full name: small ones, such as norms that took a scale over."""
        found: dict[str, Tensor] = {}
        for block in range(self.blocks):
            found |= self.store.replaced(block)
        return found

    def record(self) -> dict[str, Any]:
        """JSON-able: bits with their breakdown, each layer's error, and what was kept dense."""
        layers: dict[str, Any] = {}
        for block in (*range(self.blocks), *self.parts):
            layers |= self.store.manifest(block)["layers"]
        rises = self.store.state(RISES) if self.store.has_state(RISES) else {}
        for name, rise in rises.items():
            layers[name]["loss_rise"] = float(rise)
        return {
            **add_up(layers),
            "layers": layers,
            "silent": [name for name, layer in layers.items() if layer["tokens"] == 0],
            "kept": dict(self.kept),
            "replaced": sorted(self.replaced()),
        }


def compress_model(
    source: ModelSource,
    plan: Plan,
    windows: Tensor,
    work: Path,
    options: StreamOptions | None = None,
    mask: Tensor | None = None,
    shared: DensePass | None = None,
) -> StreamSummary:
    """Compress every linear of every block, and embedding and head, as `plan` says, on the token `windows [count, length]`.

    `mask`, bool of the windows' shape, tells padding at the right from text; None: all is text. `work` holds what is
    finished; a run that was killed goes on from it and ends in the same bytes. Raises InputError where the folder belongs to
    other settings or most linear weights would stay dense, NumericsError with the layer's name where weights, activations or
    results are not finite. `shared` is a dense pass over the same windows, from which statistics of dense inputs are read
    instead of being gathered: what is stored is the same.
    """
    options = options or StreamOptions()
    options = replace(options, inputs=options.inputs or plan.method.inputs)
    stacking, stacked = stacking_of(source, plan)
    tuning = _tuning_method(plan)
    if options.blocks is not None:  # what concerns the whole model is not for a few blocks
        stacking = tuning = None
    tables = Tables.of(source, plan) if options.blocks is None else None
    adapter = Adapter(source.shell())
    kept = adapter.kept | _kept_by_plan(adapter, plan)
    store = Store(work, run_settings(source, plan, windows, mask, options))
    with torch.no_grad():
        dense, text = source, (windows, mask)
        if tables is not None:
            kept = {name: reason for name, reason in kept.items() if name not in tables.compressed()}
            source = tables.begin(store, cast(str, options.inputs))
            shared = shared if source is dense else None  # it saw the dense embedding
        if isinstance(plan.method, BlockMethod):
            blocks = _compress_by_blocks(source, plan, plan.method, store, text, options)
        else:
            # Where nothing is gathered, or all is there already, one batch of hidden states is enough to show what may be folded.
            there = not plan.needs() or (shared is not None and options.inputs == "original")
            seen = slice(options.batch_size if there else None)
            feed = Feed(source, source.shell(), windows[seen], None if mask is None else mask[seen], options)
            _Run(plan, feed, store, text, shared).compress_blocks()
            blocks = len(feed.blocks)
            if tuning is not None:
                tune_blocks(source, tuning, store, blocks, text, options.progress)
        order = None if stacking is None else order_terms(source, stacking, stacked, store, text, options)
        if tables is not None:
            tables.finish(store, adapter.blocks, text, options)
    return StreamSummary(store, blocks, kept, order, () if tables is None else tables.parts())


def _compress_by_blocks(
    source: ModelSource, plan: Plan, method: BlockMethod, store: Store, text: tuple[Tensor, Tensor | None], options: StreamOptions
) -> int:
    """Repair where the method asks for it, reconstruct block by block, tune the whole where it asks for that; how many blocks."""

    def compress(target: Store, model: ModelSource = source) -> int:
        feed = Feed(model, model.shell(), *text, options)
        reconstruct_blocks(plan, feed, target)
        return len(feed.blocks)

    restoration, tuning = (method.restoration(), method.tuning()) if options.blocks is None else (None, None)
    if restoration is not None and restoration.steps:
        source = restored(source, plan, restoration, store, compress, text, options.progress)
    blocks = compress(store, source)
    if tuning is not None and tuning.steps:
        tune_blocks(source, method, store, blocks, text, options.progress)
    return blocks


def _tuning_method(plan: Plan) -> LayerMethod | None:
    """The layer method that has the whole model trained at last. Raises InputError where it has not all the layers to itself."""
    asking = [one for one in plan.methods() if isinstance(one, LayerMethod) and one.tuning()]
    if asking and plan.overrides:
        raise InputError(f"{asking[0].name()} trains the whole model at last; a recipe without overrides would be right")
    return asking[0] if asking else None


def run_settings(source: ModelSource, plan: Plan, windows: Tensor, mask: Tensor | None, options: StreamOptions) -> dict[str, Any]:
    """Everything that decides the result."""
    return {
        "model": source.fingerprint(),
        "plan": plan.describe(),
        "windows": [list(windows.shape), _hash(windows), None if mask is None else _hash(mask.to(torch.uint8))],
        "inputs": options.inputs,
        "dtype": str(options.dtype),
        "fold": options.fold,
        "batch_size": options.batch_size,
        "threads": torch.get_num_threads(),
    }


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def _kept_by_plan(adapter: Adapter, plan: Plan) -> dict[str, str]:
    linears = {name: module for block in adapter.blocks for name, module in adapter.linears(block).items()}
    kept = {name: f"kept by the pattern {pattern!r}" for name in linears if (pattern := plan.keeps(name)) is not None}
    total = sum(weight_matrix(linear).numel() for linear in linears.values())
    left = sum(weight_matrix(linears[name]).numel() for name in kept)
    if 2 * left > total:
        raise InputError(f"the patterns {list(plan.keep)} keep {left} of {total} linear weights dense; keep less than half")
    return kept


class _Run:
    """Layer methods: a block's statistics are gathered in one forward, then its linears are solved."""

    def __init__(self, plan: Plan, feed: Feed, store: Store, text: tuple[Tensor, Tensor | None], shared: DensePass | None = None) -> None:
        self.plan, self.feed, self.store, self.text, self.shared = plan, feed, store, text, shared
        self.source, self.shell, self.options = feed.source, feed.shell, feed.options
        self.adapter = Adapter(feed.shell)

    def compress_blocks(self) -> None:
        blocks, done = self.feed.blocks, self.store.finished()
        if done == len(blocks):
            return
        self._look_ahead()
        hidden = self.feed.keep(self.store, 0, self.feed.first_inputs())
        if done:
            hidden = self.feed.kept(self.store, done)
        began = time.monotonic()
        for index in range(done, len(blocks)):
            hidden = self._compress_block(index, hidden, began, done)

    def _look_ahead(self) -> None:
        """What must be known of the whole model before its first layer: gradients and plans, for methods that ask; kept in files."""
        layers = [name for block in self.feed.blocks for name in self.adapter.linears(block)]
        methods = {name: method for name in layers if isinstance(method := self.plan.method_for(name), LayerMethod)}
        keep_sensitivities(self.source, methods, self.text[0], self.store)
        keep_profile(self.source, methods, self.text, self.store, self.options.progress)
        if not self.store.has_state(_CHOICES):
            choices: dict[str, Tensor] = {}
            for method in set(methods.values()):
                choices |= method.plan(self._planned_layers(method, [name for name in methods if methods[name] == method]))
            if choices:
                self.store.write_state(_CHOICES, choices)

    def _planned_layers(self, method: LayerMethod, names: list[str]) -> Iterator[tuple[str, Tensor, Statistics]]:
        for name in names:
            linear = self.shell.get_submodule(name)
            weight = oriented(linear, self.source.parameter(f"{name}.weight")).float().contiguous()
            if not bool(torch.isfinite(weight).all()):
                raise BrokenModelError(f"{name}: the weight is not finite; the model file is broken")
            sensitivities = self.store.state(SENSITIVITIES, [name]) if method.uses_gradients else {}
            if method.profiling() is not None:
                sensitivities = self.store.state(RISES, [name])
            yield name, weight, Statistics(sensitivities=sensitivities)

    def _compress_block(self, index: int, hidden: Tensor, began: float, done: int) -> Tensor:
        name = self.feed.blocks[index]
        self.source.load_module(self.shell, name, self.options.dtype)
        return_freed_memory()
        linears = checked_linears(self.adapter, name, self.plan)
        dense, groups, stored, entries = self._solve(name, linears, hidden)
        replaced: dict[str, Tensor] = {}
        if self.options.inputs == "propagated" or self.options.fold:
            for layer, part in stored.items():
                self.shell.set_submodule(layer, CompressedLinear(part, cast(Tensor | None, linears[layer].bias)))
        if self.options.fold:
            stored, replaced = self._fold(name, stored, groups, hidden)
            entries = {layer: entry | {"bits": stored[layer].bits()} for layer, entry in entries.items()}
        if index + 1 < len(self.feed.blocks):
            # The next inputs first: the block counts as done only when the run can go on from it.
            outputs = dense if self.options.inputs == "original" else self.feed.forward([name], hidden)
            hidden = self.feed.keep(self.store, index + 1, finite(name, outputs))
        self.store.write_block(index, stored, {"layers": entries}, replaced)
        self.store.drop_activations(keep=index + 1)
        self.shell.set_submodule(name, nn.Identity())  # nothing of a finished block stays in memory
        report(self.options.progress, index, len(self.feed.blocks), entries, (time.monotonic() - began) / (index - done + 1))
        return hidden

    def _fold(
        self, name: str, stored: dict[str, StoredLinear], groups: list[tuple[str, ...]], hidden: Tensor
    ) -> tuple[dict[str, StoredLinear], dict[str, Tensor]]:
        """The layers without the scales that a norm took over, and the norms' new parameters by full name, in the file's dtype."""
        inside = [tuple(layer.removeprefix(f"{name}.") for layer in group) for group in groups]
        layers = {layer.removeprefix(f"{name}."): part for layer, part in stored.items()}
        batch = hidden[: self.options.batch_size]
        folded, parameters = fold_scales(self.shell.get_submodule(name), layers, inside, lambda: self.feed.run([name], batch, 0))
        replaced = {}
        for inner, value in parameters.items():
            full = f"{name}.{inner}"
            replaced[full] = value.to(self.source.parameter(full).dtype)
            self.shell.get_parameter(full).data.copy_(replaced[full])
        return {layer: folded.get(layer.removeprefix(f"{name}."), part) for layer, part in stored.items()}, replaced

    def _solve(
        self, block: str, linears: Mapping[str, nn.Module], hidden: Tensor
    ) -> tuple[list[Tensor], list[tuple[str, ...]], dict[str, StoredLinear], dict[str, Any]]:
        """The dense outputs where they are asked for, the groups of one input, the linears compressed, what the manifest says of each."""
        needs = {need for name in linears for need in _layer_method(self.plan.method_for(name), name).needs}
        outputs, gathered = self._gather(block, linears, needs, hidden)
        groups = list(gathered)
        stored: dict[str, StoredLinear] = {}
        entries: dict[str, Any] = {}
        for solved, said in self.options.workers.map(solve_job, self._jobs(linears, gathered)):
            stored |= solved
            entries |= said
        return outputs, groups, {name: stored[name] for name in linears}, {name: entries[name] for name in linears}

    def _jobs(self, linears: Mapping[str, nn.Module], gathered: dict[tuple[str, ...], Statistics]) -> Iterator[tuple[Statistics, GroupJob]]:
        """One for each group of linears that read one tensor and each method among them; `gathered` is emptied."""
        chosen = set(self.store.state_names(_CHOICES)) if self.store.has_state(_CHOICES) else set()
        for group in list(gathered):
            statistics = gathered.pop(group)  # a group's statistics go as soon as it is solved
            return_freed_memory()
            if not statistics.tokens:
                assume_nothing(statistics)
            for method, names in self._by_method(group).items():
                weights = Weights(self.source, {name: linears[name] for name in names}, self.options.dtype)
                sensitivities = self.store.state(SENSITIVITIES, names) if method.uses_gradients else {}
                choices = self.store.state(_CHOICES, [name for name in names if name in chosen]) if chosen else {}
                given = self.options.moments
                moments = None if given is None else {name: given(name) for name in names}
                yield statistics, GroupJob(method, weights, sensitivities, choices, moments)

    def _gather(
        self, block: str, linears: Mapping[str, nn.Module], needs: set[type[Accumulator]], hidden: Tensor
    ) -> tuple[list[Tensor], dict[tuple[str, ...], Statistics]]:
        """As `gather_inputs`; the first block reads the same in every run, and the others do where they see dense inputs."""
        original, index = self.options.inputs == "original", self.feed.blocks.index(block)
        if self.shared is None or (index and not original):
            return gather_inputs(self.feed, [block], linears, needs, hidden, original)
        outputs = list(self.feed.forward([block], hidden)) if original else []
        return outputs, self.shared.statistics(index, needs, linears)

    def _by_method(self, group: tuple[str, ...]) -> dict[LayerMethod, list[str]]:
        chosen: dict[LayerMethod, list[str]] = {}
        for name in group:
            chosen.setdefault(_layer_method(self.plan.method_for(name), name), []).append(name)
        return chosen


def _layer_method(method: Method | None, name: str) -> LayerMethod:
    if not isinstance(method, LayerMethod):
        raise InputError(f"{name}: {type(method).__name__} does not compress single layers; a layer method such as gptq would be right")
    return method
