"""Blocks and windows of blocks whose stand-ins are trained until their outputs are near the dense blocks' own.

Two streams of hidden states run along: the dense model's, and that of the compressed predecessors. A window starts from the
second and is compared with what the dense window makes of both.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewbits.core.errors import InputError, NumericsError
from fewbits.core.method import BlockMethod, Statistics
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.models.adapter import Adapter, weight_matrix
from fewbits.models.reorder import reorder_channels
from fewbits.pipeline.entries import checked_linears, layer_entry, report, second_moment
from fewbits.pipeline.feed import Feed, finite
from fewbits.pipeline.gather import assume_nothing, gather_inputs
from fewbits.pipeline.gradients import SENSITIVITIES, keep_sensitivities
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.store import Store
from fewbits.pipeline.train import BestStep, train

_DENSE, _MIXED = "-dense", "-mixed"


def reconstruct_blocks(plan: Plan, feed: Feed, store: Store) -> None:
    """Compress all blocks with the plan's block method; goes on from what `store` holds.

    Raises InputError where the plan gives some layers another method, or the windows do not overlap sensibly.
    """
    method = plan.method
    assert isinstance(method, BlockMethod)
    if plan.overrides:
        raise InputError(f"{method.name()} trains whole blocks; a recipe without overrides would be right")
    if not 0 <= method.overlap < method.window:
        raise InputError(f"overlap={method.overlap} does not fit window={method.window}; 0 to {method.window - 1} would be right")
    if method.norm_rate and method.overlap:
        raise InputError("norms are trained in windows that do not overlap; overlap=0 would be right")
    _Windows(plan, method, feed, store).run()


class _Open:
    """A block in training: its dense linears, their stand-ins, and what the record will need."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self.linears = linears
        self.learned: dict[str, LearnedLinear] = {}
        self.moments: dict[str, tuple[Tensor | None, int]] = {}
        self.norms: dict[str, nn.Parameter] = {}
        self.orders: dict[str, Tensor] = {}  # of the rows of layers whose channels were put in another order


class _Windows:
    def __init__(self, plan: Plan, method: BlockMethod, feed: Feed, store: Store) -> None:
        self.plan, self.method, self.feed, self.store = plan, method, feed, store
        self.shell, self.adapter = feed.shell, Adapter(feed.shell)
        self.open: dict[str, _Open] = {}

    def run(self) -> None:
        stride = self.method.window - self.method.overlap
        done = self.store.finished()
        if done == len(self.feed.blocks):
            return
        layers = [layer for name in self.feed.blocks for layer in self.adapter.linears(name) if self.plan.keeps(layer) is None]
        keep_sensitivities(self.feed.source, dict.fromkeys(layers, self.method), self.feed.windows, self.store)
        # Of blocks that leave a window together some may be stored and others not: their window is trained again.
        start = max(block for block in range(done + 1) if block == 0 or self._is_kept(block))
        dense = mixed = self.feed.keep(self.store, 0, self.feed.first_inputs(), _MIXED)
        if start:
            dense, mixed = (self.feed.kept(self.store, start, stream) for stream in (_DENSE, _MIXED))
            self._reopen(start)
        began, first = time.monotonic(), start
        while start < len(self.feed.blocks):
            names = self.feed.blocks[start : start + self.method.window]
            last = start + self.method.window >= len(self.feed.blocks)
            leaving = names if last else names[:stride]
            self._train_window(names, leaving, dense, mixed, same=start == 0)
            dense, mixed = self._leave(start, leaving, dense, mixed, last)
            start += len(leaving)
            pace = (time.monotonic() - began) / (start - first)
            report(self.feed.options.progress, start - 1, len(self.feed.blocks), self.store.manifest(start - 1)["layers"], pace)

    def _is_kept(self, block: int) -> bool:
        return all(self.store.has_activations(block, stream) for stream in (_DENSE, _MIXED))

    def _train_window(self, names: Sequence[str], leaving: Sequence[str], dense: Tensor, mixed: Tensor, same: bool) -> None:
        self._load(names)
        dense_target = self._all_outputs(names, dense)
        mixed_target = dense_target if same else self._all_outputs(names, mixed)
        for position, name in enumerate(names):
            if not self.open[name].learned:
                self._begin(names[: position + 1], mixed)
            self._install(name, self.open[name].learned)
        if self.method.steps:
            with torch.enable_grad():
                self._train(names, leaving, (mixed, dense_target, mixed_target))

    def _load(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.open:
                self.feed.source.load_module(self.shell, name, self.feed.options.dtype)
                self.open[name] = _Open(checked_linears(self.adapter, name, self.plan))
                if self.method.sorts_channels:
                    block, linears = self.shell.get_submodule(name), self.open[name].linears
                    self.open[name].orders = reorder_channels(name, block, linears, self.method.order_channels)
            self._install(name, self.open[name].linears)

    def _all_outputs(self, names: Sequence[str], hidden: Tensor) -> Tensor:
        return torch.cat(list(finite(names[-1], self.feed.forward(names, hidden))))

    def _begin(self, names: Sequence[str], mixed: Tensor) -> None:
        """Stand-ins for the last of `names`, from statistics of its inputs behind the stand-ins of the others."""
        block = self.open[names[-1]]
        needs = self.method.needs
        _, gathered = gather_inputs(self.feed, names, block.linears, needs, mixed, False)
        for group in list(gathered):
            statistics = gathered.pop(group)
            tokens = statistics.tokens
            if not tokens:
                assume_nothing(statistics)
            moment = second_moment(statistics)
            statistics.choices = block.orders
            block.learned |= self._stand_ins({name: block.linears[name] for name in group}, statistics)
            judged = None if block.orders else self.feed.options.moments  # which knows channels in their old order
            block.moments |= {name: (moment if judged is None else judged(name), tokens) for name in group}
        block.learned = {name: block.learned[name] for name in block.linears}

    def _stand_ins(self, linears: Mapping[str, nn.Module], statistics: Statistics) -> dict[str, LearnedLinear]:
        weights = {name: weight_matrix(linear).float().contiguous() for name, linear in linears.items()}
        biases = {name: cast("Tensor | None", linear.bias) for name, linear in linears.items()}
        if self.method.uses_gradients:
            statistics.sensitivities = self.store.state(SENSITIVITIES, linears)
        try:
            return cast("dict[str, LearnedLinear]", self.method.begin_group(weights, biases, statistics))
        except NumericsError as error:
            raise NumericsError(f"{', '.join(linears)}: {error}") from error

    def _train(self, names: Sequence[str], leaving: Sequence[str], streams: tuple[Tensor, Tensor, Tensor]) -> None:
        """`streams`: the window's inputs, and what its dense blocks make of the dense model's inputs and of these."""
        mixed, dense_target, mixed_target = streams
        method, learned = self.method, [(one, name in leaving) for name in names for one in self.open[name].learned.values()]
        groups = [group for one, _ in learned for group in one.groups() if group["params"]]
        norms = self._norms(names) if method.norm_rate else []
        if norms:
            groups.append({"params": norms, "lr": method.norm_rate})
        index = self.feed.blocks.index(names[0])
        # Sequences of one batch share the blocks' other arguments, so a step draws its sequences from one of them.
        order = torch.Generator().manual_seed(method.seed * 100003 + index)
        size = self.feed.options.batch_size
        first: list[tuple[float, float]] = []
        trained = [one for group in groups for one in group["params"]]
        best = BestStep(trained, lambda: self._loss_of_all(names, streams), method.look_every)

        def loss(step: int) -> Tensor:
            best.look(step)
            number = int(torch.randint(-(-len(mixed) // size), (1,), generator=order))
            inside = min(size, len(mixed) - number * size)
            if inside > method.batch_size and self.feed.mask is None and self._shareable(names, number, inside):
                chosen = number * size + torch.randperm(inside, generator=order)[: method.batch_size]
            else:
                chosen = number * size + torch.arange(inside)
            for one, leaves in learned:
                one.advance(step / method.steps, leaves)
            outputs = self.feed.run(names, mixed[chosen], number)
            penalty = torch.stack([one.penalty() for one, _ in learned]).sum()
            distance = method.loss(outputs, dense_target[chosen], mixed_target[chosen])
            if not first:
                first.append((float(distance.detach()), float(penalty.detach())))
            return method.total(distance, penalty, first[0], step / method.steps)

        def show(step: int, value: float, left: float) -> None:
            if self.feed.options.progress is not None:
                text = f"{names[0]}, {len(names)} in the window, step {step + 1}/{method.steps}"
                self.feed.options.progress(index - 1, len(self.feed.blocks), text, value, left)

        if groups:
            train(groups, loss, method.steps, seed=method.seed, progress=show)
            best.restore()

    def _loss_of_all(self, names: Sequence[str], streams: tuple[Tensor, Tensor, Tensor]) -> float:
        """The method's loss of all sequences, the mean over batches."""
        parts = zip(*(stream.split(self.feed.options.batch_size) for stream in streams), strict=True)
        losses = [
            self.method.loss(self.feed.run(names, mixed, number), dense, own) * len(mixed)
            for number, (mixed, dense, own) in enumerate(parts)
        ]
        return float(torch.stack(losses).sum()) / len(streams[0])

    def _shareable(self, names: Sequence[str], number: int, sequences: int) -> bool:
        """Whether no argument of a block is a tensor of its own for each sequence of the batch."""
        tensors = [value for name in names for value in _tensors(self.feed.calls[name][number])]
        return all(tensor.ndim == 0 or tensor.shape[0] in (0, 1) or tensor.shape[0] != sequences for tensor in tensors)

    def _norms(self, names: Sequence[str]) -> list[nn.Parameter]:
        for name in names:
            block = self.shell.get_submodule(name)
            inside = {inner: one for inner, one in block.named_parameters() if one.ndim == 1 and not inner.endswith("bias")}
            standing = tuple(layer.removeprefix(f"{name}.") for layer in self.open[name].learned)
            self.open[name].norms = {inner: one for inner, one in inside.items() if not inner.startswith(standing)}
        norms = [one for name in names for one in self.open[name].norms.values()]
        for one in norms:
            one.requires_grad_(True)
        return norms

    def _leave(self, start: int, leaving: Sequence[str], dense: Tensor, mixed: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """Harden and store the blocks that leave the window; both streams go on behind them."""
        finished = [self._finish(name) for name in leaving]
        following = start + len(leaving)
        if not last:
            # A trained norm belongs to the compressed model: the dense stream needs the old one.
            for name in leaving:
                self._install(name, self.open[name].linears)
                self._set_norms(name, original=True)
            next_dense = self.feed.keep(self.store, following, finite(leaving[-1], self.feed.forward(leaving, dense)), _DENSE)
            for name, (stored, _, _) in zip(leaving, finished, strict=True):
                biases = {layer: cast("Tensor | None", self.open[name].linears[layer].bias) for layer in stored}
                self._install(name, {layer: CompressedLinear(part, biases[layer]) for layer, part in stored.items()})
                self._set_norms(name, original=False)
            next_mixed = self.feed.keep(self.store, following, finite(leaving[-1], self.feed.forward(leaving, mixed)), _MIXED)
            dense, mixed = next_dense, next_mixed
            self._save_open(following, leaving)
        for offset, (stored, entries, replaced) in enumerate(finished):
            self.store.write_block(start + offset, stored, {"layers": entries}, replaced)
        for name in leaving:
            self.shell.set_submodule(name, nn.Identity())
            del self.open[name]
        self.store.drop_activations(keep=following)
        self.store.drop_state(f"open-{start:05d}")
        return dense, mixed

    def _finish(self, name: str) -> tuple[dict[str, StoredLinear], dict[str, Any], dict[str, Tensor]]:
        """What is stored of a block, what is said of it, and its trained norms."""
        block = self.open[name]
        stored, entries = {}, {}
        for layer, learned in block.learned.items():
            learned.harden()
            stored[layer] = learned.finish()
            weight = weight_matrix(block.linears[layer]).float()
            entries[layer] = layer_entry(layer, weight, stored[layer], *block.moments[layer])
        return stored, entries, self._new_norms(name)

    def _new_norms(self, name: str) -> dict[str, Tensor]:
        """Trained norms by full name, rounded to the file's dtype."""
        block = self.open[name]
        names = {inner: f"{name}.{inner}" for inner in block.norms}
        return {full: block.norms[inner].detach().to(self.feed.source.parameter(full).dtype) for inner, full in names.items()}

    def _set_norms(self, name: str, original: bool) -> None:
        trained = self._new_norms(name) if not original else {}
        for inner, parameter in self.open[name].norms.items():
            full = f"{name}.{inner}"
            if original:
                self.open[name].norms[inner] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            value = self.feed.source.parameter(full) if original else trained[full]
            owner, _, leaf = full.rpartition(".")
            setattr(self.shell.get_submodule(owner), leaf, nn.Parameter(value.to(parameter.dtype), requires_grad=False))

    def _install(self, name: str, modules: Mapping[str, nn.Module]) -> None:
        for layer, module in modules.items():
            self.shell.set_submodule(layer, module)

    def _save_open(self, following: int, leaving: Sequence[str]) -> None:
        """Everything learned so far of blocks that the next window trains again."""
        tensors: dict[str, Tensor] = {}
        for name, block in self.open.items():
            if name in leaving:
                continue
            for layer, learned in block.learned.items():
                tensors |= {f"learned/{layer}/{key}": value.detach() for key, value in learned.state_dict().items()}
                moment, tokens = block.moments[layer]
                tensors[f"tokens/{layer}"] = torch.tensor(tokens)
                if moment is not None:
                    tensors[f"moment/{layer}"] = moment
        if tensors:
            self.store.write_state(f"open-{following:05d}", tensors)

    def _reopen(self, start: int) -> None:
        """The inverse of `_save_open`."""
        state = f"open-{start:05d}"
        if not self.store.has_state(state):
            return
        tensors = self.store.state(state)
        for name in self.feed.blocks[start : start + self.method.overlap]:
            self._load([name])
            block = self.open[name]
            for layer, linear in block.linears.items():
                nothing = Statistics(*(need(weight_matrix(linear).shape[1]) for need in self.method.needs))
                assume_nothing(nothing)
                nothing.choices = block.orders
                block.learned |= self._stand_ins({layer: linear}, nothing)
                mine = {
                    key.removeprefix(f"learned/{layer}/"): value for key, value in tensors.items() if key.startswith(f"learned/{layer}/")
                }
                block.learned[layer].load_state_dict(mine)
                block.moments[layer] = (tensors.get(f"moment/{layer}"), int(tensors[f"tokens/{layer}"]))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    arguments = getattr(value, "arguments", None)
    return [] if arguments is None else _tensors(arguments) + _tensors(value.keywords)
