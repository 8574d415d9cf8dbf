"""One run of the dense model over windows of tokens, whose statistics and last hidden states are kept for every method that asks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.method import Accumulator, LayerMethod, Statistics
from fewbits.models.adapter import Adapter, weight_matrix
from fewbits.models.source import ModelSource
from fewbits.pipeline.feed import Feed, StreamOptions
from fewbits.pipeline.gather import gather_inputs
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.store import Store
from fewbits.statistics.hessian import Hessian

_GROUPS, _WRAPPED = "groups", "wrapped"
Group = tuple[str, ...]  # full names of the linears that read one tensor


class DensePass:
    """What a model's linears read on `windows [count, length]` while all its blocks are dense, on disk below `folder`.

    The place is named by the hash of everything that decides the content: weights, tokens, dtype, batches, threads. Each
    statistic of each block is a file of its own, so that a method that comes later adds only what is missing.
    """

    def __init__(
        self, source: ModelSource, windows: Tensor, mask: Tensor | None, folder: Path, options: StreamOptions | None = None
    ) -> None:
        self.source, self.windows, self.mask = source, windows, mask
        self.options = options or StreamOptions()
        settings = {
            "model": source.fingerprint(),
            "tokens": tensor_hash(windows),
            "mask": None if mask is None else tensor_hash(mask.to(torch.uint8)),
            "dtype": str(self.options.dtype),
            "batch_size": self.options.batch_size,
            "threads": torch.get_num_threads(),
        }
        self.key = content_key(settings)
        self.store = Store(folder / self.key[:16], settings)
        self._open()

    def _open(self) -> None:
        self.shell = self.source.shell()
        adapter = Adapter(self.shell)
        self.blocks = adapter.blocks
        self._linears = {name: adapter.linears(name) for name in self.blocks}
        self._moments = lru_cache(maxsize=1)(self._read_moments)

    def __getstate__(self) -> dict[str, Any]:
        """Another process reads the same files, which must lie at the same place there."""
        return {name: getattr(self, name) for name in ("source", "windows", "mask", "options", "key", "store")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open()

    def gather(self, needs: Iterable[type[Accumulator]], *, final: bool = False, blocks: int | None = None) -> None:
        """Make sure that each of `needs` is kept, of the first `blocks` or of all, and the last hidden states if `final`.

        A killed run goes on where it was. Raises NumericsError where what a layer reads is not finite.
        """
        leading = range(len(self.blocks) if blocks is None else blocks)
        missing = [need for need in set(needs) if not all(self.store.has_state(_state(need, block)) for block in leading)]
        whole = all(self.store.has_state(_block_state(_GROUPS, block)) for block in leading)
        if missing or not whole or (final and not self._has_final()):
            with torch.no_grad():
                self._run(missing, final, len(leading))

    def _run(self, needs: list[type[Accumulator]], final: bool, count: int) -> None:
        feed = Feed(self.source, self.shell, self.windows, self.mask, self.options)
        hidden, done = feed.keep(self.store, 0, feed.first_inputs()), self._resumable(needs)
        if done:
            hidden = feed.kept(self.store, done)
        for index in range(done, count):
            name = self.blocks[index]
            self.source.load_module(self.shell, name, self.options.dtype)
            outputs, gathered = gather_inputs(feed, [name], self._linears[name], needs, hidden, index + 1 < count or final)
            self._write(index, needs, gathered)
            if index + 1 == len(self.blocks):
                wrapped = isinstance(feed.calls[name][0].call(self.shell.get_submodule(name), hidden[: self.options.batch_size]), tuple)
                self.store.write_state(_WRAPPED, {_WRAPPED: torch.tensor(wrapped)})
            self.shell.get_submodule(name).to("meta")
            if outputs:
                hidden = feed.keep(self.store, index + 1, outputs)
            self.store.drop_activations(keep=index + 1)
            if self.options.progress is not None:
                self.options.progress(index, count, f"{name}: the dense model", 0.0, 0.0)

    def _resumable(self, needs: list[type[Accumulator]]) -> int:
        """The first block to run: all before it are whole, and its inputs are kept."""
        for index in range(len(self.blocks) - 1, 0, -1):
            files = [_block_state(_GROUPS, block) for block in range(index)] + [
                _state(need, block) for need in needs for block in range(index)
            ]
            if self.store.has_activations(index) and all(self.store.has_state(name) for name in files):
                return index
        return 0

    def _write(self, block: int, needs: list[type[Accumulator]], gathered: Mapping[Group, Statistics]) -> None:
        for need in needs:
            found = {f"{group[0]}|{name}": value for group, one in gathered.items() for name, value in _contents(one[need]).items()}
            self.store.write_state(_state(need, block), found)
        groups = {",".join(group): torch.tensor(one.tokens) for group, one in gathered.items()}
        order = {f"{number:05d}|{names}": tokens for number, (names, tokens) in enumerate(groups.items())}
        self.store.write_state(_block_state(_GROUPS, block), order)

    def statistics(self, block: int, needs: Iterable[type[Accumulator]], linears: Iterable[str]) -> dict[Group, Statistics]:
        """What was gathered of those of the block's `linears`, by groups that read one tensor, as `gather_inputs` gives it.

        Raises InputError where one of `needs` was not gathered.
        """
        wanted, kept = set(linears), self.store.state(_block_state(_GROUPS, block))
        states = {need: self._state(need, block) for need in sorted(set(needs), key=lambda need: need.__name__)}
        found: dict[Group, Statistics] = {}
        for described, tokens in sorted(kept.items()):
            group = tuple(described.partition("|")[2].split(","))
            inside = tuple(name for name in group if name in wanted)
            if inside:
                features = weight_matrix(self._linears[self.blocks[block]][group[0]]).shape[1]
                made = (_restored(need, features, _below(group[0], state)) for need, state in states.items())
                found[inside] = Statistics(*made, tokens=int(tokens))
        return found

    def _state(self, need: type[Accumulator], block: int) -> dict[str, Tensor]:
        if not self.store.has_state(_state(need, block)):
            raise InputError(f"{self.store.folder} lacks the statistic {need.__name__} of block {block}; gather it first")
        return self.store.state(_state(need, block))

    def moment(self, layer: str) -> Tensor | None:
        """float32 `[in, in]`, up to a factor: the second moment of what `layer` reads; None where no token reached it."""
        block = next(index for index, name in enumerate(self.blocks) if layer.startswith(f"{name}."))
        return self._moments(block).get(layer)

    def _read_moments(self, block: int) -> dict[str, Tensor]:
        groups = self.statistics(block, [Hessian], self._linears[self.blocks[block]])
        return {name: one[Hessian].matrix for group, one in groups.items() if one.tokens for name in group}

    def final(self) -> tuple[Tensor, bool]:
        """Hidden states `[count, length, features]` behind the last block, left in their file, and whether it returns a tuple.

        Raises InputError where they were not kept.
        """
        shape = (*self.windows.shape, self.source.config.get_text_config().hidden_size)
        hidden = self.store.activations(len(self.blocks), shape, self.options.dtype, True)
        if hidden is None:
            raise InputError(f"{self.store.folder} lacks the last hidden states; gather them first")
        return hidden, bool(self.store.state(_WRAPPED)[_WRAPPED])

    def _has_final(self) -> bool:
        return self.store.has_activations(len(self.blocks)) and self.store.has_state(_WRAPPED)


def reads_text(plan: Plan) -> bool:
    """Whether calibration text changes what the plan's methods do: rounding to nearest, for one, never looks at any."""
    methods = plan.methods()
    plain = [one for one in methods if isinstance(one, LayerMethod) and not one.needs and not one.uses_gradients]
    return len(plain) < len(methods) or any(one.profiling() or one.tuning() or one.stacking() for one in plain)


def content_key(settings: Mapping[str, Any]) -> str:
    """SHA-256 of what decides a result, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's shape and bytes."""
    digest = hashlib.sha256(str(list(tensor.shape)).encode())
    digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _state(need: type[Accumulator], block: int) -> str:
    return _block_state(need.__name__.lower(), block)


def _block_state(name: str, block: int) -> str:
    return f"{name}-{block:05d}"


def _contents(accumulator: Accumulator) -> dict[str, Tensor]:
    """Everything that an accumulator holds, numbers as tensors without dimensions; what is None is left out."""
    found = {}
    for name, value in vars(accumulator).items():
        if value is not None and name != "features":
            found[name] = (
                value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64 if type(value) is int else torch.float64)
            )
    return found


def _restored(need: type[Accumulator], features: int, contents: Mapping[str, Tensor]) -> Accumulator:
    made = need(features)
    for name, value in contents.items():
        setattr(made, name, value if isinstance(getattr(made, name), Tensor) else value.item())
    return made


def _below(group: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.partition("|")[2]: value for name, value in state.items() if name.startswith(f"{group}|")}
