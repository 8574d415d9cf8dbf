"""In which order the terms of all layers are loaded, where any first few terms of a layer are a tensor.

Source: BitStack (arXiv 2410.23918), section 3.3: importance of residual blocks, "average" sorting.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from fewbits.core.errors import InputError
from fewbits.core.method import LayerMethod, Stacking
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.models.adapter import Adapter, oriented
from fewbits.models.experts import mark_padding
from fewbits.models.source import ModelSource
from fewbits.pipeline.capture import Capture
from fewbits.pipeline.feed import StreamOptions
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.store import Store

_STATE = "stack"
Text = tuple[Tensor, Tensor | None]  # windows [count, length], and which of their tokens are text


def stacking_of(source: ModelSource, plan: Plan) -> tuple[Stacking | None, tuple[str, ...]]:
    """How terms are to be ranked, and the layers whose are; None where no method asks for it.

    Raises InputError where methods ask for different orders, or for perplexity of a model that predicts no tokens.
    """
    adapter = Adapter(source.shell())
    asked: dict[str, Stacking] = {}
    for layer in (layer for block in adapter.blocks for layer in adapter.linears(block)):
        method = plan.method_for(layer)
        if isinstance(method, LayerMethod) and (stacking := method.stacking()) is not None:
            asked[layer] = stacking
    if len(set(asked.values())) > 1:
        raise InputError(f"the layers' methods rank their terms in {len(set(asked.values()))} ways; one way for all would be right")
    stacking = next(iter(asked.values()), None)
    if stacking is not None and stacking.order == "average" and source.is_encoder:
        raise InputError(f"{source.name!r} is an encoder and has no perplexity to rank terms by; order='random' would be right")
    return stacking, tuple(asked)


def order_terms(
    source: ModelSource, stacking: Stacking, layers: Sequence[str], store: Store, text: Text, options: StreamOptions
) -> tuple[str, ...]:
    """Full names of `layers`, all of whose blocks the `store` holds: a layer's n-th mention is that of its term n + 1.

    All second terms come before all third ones, and so on. What is measured is kept level by level: a run that is killed goes
    on and ends in the same order. The whole model is in memory, dense.
    """
    adapter = Adapter(source.shell())
    blocks = range(len(adapter.blocks))
    counts = {name: _terms(settings) for block in blocks for name, settings in store.manifest(block)["settings"].items() if name in layers}
    levels = [[name for name in counts if counts[name] > level] for level in range(1, max(counts.values(), default=1))]
    if stacking.order == "random":
        generator = torch.Generator().manual_seed(stacking.seed)
        return tuple(names[i] for names in levels for i in torch.randperm(len(names), generator=generator).tolist())
    scores = store.state(_STATE) if store.has_state(_STATE) else {}
    probe = None
    for level, names in enumerate(levels, start=1):
        if str(level) not in scores:
            probe = probe or _Probe(source, store, _some(text, stacking.windows), options)
            found = probe.perplexities(level, names, len(levels))
            scores[str(level)] = torch.tensor([found[name] for name in names], dtype=torch.float64)
            store.write_state(_STATE, scores)
    return ranked([dict(zip(names, scores[str(level)].tolist(), strict=True)) for level, names in enumerate(levels, start=1)])


def ranked(levels: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    """Each level's layers by rising score, level after level.

    A score that is not finite becomes the layer's score on the next level (none: zero) plus the largest of its own level, so
    that it comes last and among its like is ranked by what can be known (appendix of the paper).
    """
    order: list[str] = []
    following: Mapping[str, float] = {}
    for scores in reversed(levels):
        largest = max((score for score in scores.values() if math.isfinite(score)), default=0.0)
        mended = {name: score if math.isfinite(score) else following.get(name, 0.0) + largest for name, score in scores.items()}
        order[:0] = sorted(mended, key=mended.__getitem__)
        following = mended
    return tuple(order)


def first_terms(stored: StoredLinear, count: int) -> StoredLinear:
    """The same layer with its first `count` terms alone."""
    return replace(stored, weight=replace(stored.weight, terms=stored.weight.terms[:count]))


def _terms(settings: Mapping[str, dict[str, dict[str, list[object]]]]) -> int:
    return len(settings["weight"]["terms"]["parts"])


def _some(text: Text, count: int) -> Text:
    windows, mask = text
    return windows[:count], None if mask is None else mask[:count].bool()


class _Probe:
    """The model with dense weights of as many terms as are asked for, and its perplexity on a text.

    Hidden states run along with the block whose layers are tried, so that no block before it is computed again.
    """

    def __init__(self, source: ModelSource, store: Store, text: Text, options: StreamOptions) -> None:
        self.store, self.options = store, options
        shell = source.shell()
        self.names = Adapter(shell).blocks
        self.capture = Capture(shell, source, self.names, options.dtype)
        windows, mask = text
        size = options.batch_size
        self.tokens = windows.split(size)
        self.masks: Sequence[Tensor | None] = [None] * len(self.tokens) if mask is None else mask.split(size)
        runs = [self.capture.run(t, None if m is None else m.long()) for t, m in zip(self.tokens, self.masks, strict=True)]
        self.first, self.calls = [hidden for hidden, _ in runs], [call for _, call in runs]
        self.blocks = [self.capture.hollow[name] for name in self.names]
        for index, (name, block) in enumerate(zip(self.names, self.blocks, strict=True)):
            source.load_detached(shell, block, name, options.dtype)
            for parameter, value in store.replaced(index).items():
                block.get_parameter(parameter.removeprefix(f"{name}.")).data.copy_(value)
        shell.tie_weights()
        source.load_module(shell, "", options.dtype)
        last = self.calls[0][self.names[-1]].call(self.blocks[-1], self.first[0])
        self.wrapped = isinstance(last, tuple)

    def perplexities(self, level: int, layers: Sequence[str], levels: int) -> dict[str, float]:
        """For each of `layers` alone with `level` + 1 terms, all others with `level`."""
        self._set(level, layers)
        found: dict[str, float] = {}
        hidden, began = list(self.first), time.monotonic()
        for index in range(len(self.names)):
            for layer, stored in self.store.layers(index):
                if layer not in layers:
                    continue
                linear = self._linear(index, layer)
                kept = linear.weight.data
                one = replace(stored.weight, terms=stored.weight.terms[level : level + 1])
                linear.weight.data = kept + oriented(linear, one.decode().to(kept.dtype))
                found[layer] = self._perplexity(index, hidden)
                linear.weight.data = kept
                if self.options.progress is not None:
                    left = (time.monotonic() - began) / len(found) * (len(layers) * (levels - level + 1) - len(found))
                    self.options.progress(index, len(self.names), f"order {level}/{levels}: {layer}", found[layer], left)
            hidden = [self._run(index, number, states) for number, states in enumerate(hidden)]
        return found

    def _set(self, level: int, layers: Sequence[str]) -> None:
        """Dense weights of `level` terms in `layers`, of all terms in what is stored else."""
        for index, name in enumerate(self.names):
            for layer, stored in self.store.layers(index):
                linear = self._linear(index, layer)
                if layer in layers:
                    weight = first_terms(stored, level).weight.decode().to(self.options.dtype)
                    linear.weight.data = oriented(linear, weight).contiguous()
                elif not isinstance(linear, CompressedLinear):
                    compressed = CompressedLinear(stored, cast("Tensor | None", linear.bias))
                    self.blocks[index].set_submodule(layer.removeprefix(f"{name}."), compressed)

    def _linear(self, index: int, layer: str) -> nn.Linear:
        return cast(nn.Linear, self.blocks[index].get_submodule(layer.removeprefix(f"{self.names[index]}.")))

    def _run(self, index: int, number: int, states: Tensor) -> Tensor:
        mark_padding(self.blocks[index], self.masks[number])
        return self.calls[number][self.names[index]].run(self.blocks[index], states)

    def _perplexity(self, start: int, hidden: Sequence[Tensor]) -> float:
        """Of what the blocks from `start` on make of `hidden`, batch by batch; padding is not predicted."""
        lost, count = 0.0, 0.0
        for number, states in enumerate(hidden):
            for index in range(start, len(self.blocks)):
                states = self._run(index, number, states)
            tokens, mask = self.tokens[number], self.masks[number]
            logits = self.capture.logits(tokens, states, self.wrapped)[:, :-1].float()
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").double()
            weights = torch.ones_like(losses) if mask is None else mask[:, 1:].flatten().double()
            lost, count = lost + float((losses * weights).sum()), count + float(weights.sum())
        return float(torch.tensor(lost / max(count, 1.0), dtype=torch.float64).exp())
