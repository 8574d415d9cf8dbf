"""What is compressed outside of a model's blocks: the embedding before the first one, and the head behind the last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewbits.core.errors import BrokenModelError, InputError
from fewbits.core.method import LayerMethod, Method, Statistics
from fewbits.layers.linear import StoredLinear
from fewbits.models.source import ChangedSource, ModelSource
from fewbits.models.vocabulary import Vocabulary, scale_of
from fewbits.pipeline.entries import layer_entry, second_moment
from fewbits.pipeline.feed import StreamOptions
from fewbits.pipeline.gather import SharedInputs, assume_nothing
from fewbits.pipeline.last_states import LastStates, Replacements
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.solve import solve_group
from fewbits.pipeline.store import Store

EMBEDDING, HEAD = "embedding", "head"  # what the store calls them
Text = tuple[Tensor, Tensor | None]  # windows [count, length], and which of their tokens are text


@dataclass(frozen=True)
class Tables:
    """The embedding and the head of a model, each with the method that compresses it, None where it stays dense.

    Of a head that is tied to the embedding there is one table, the embedding's, and one method. Rows of a table are looked up one
    by one, so that all its columns count alike: to a method that asks what the inputs are, they are uncorrelated. A head of its
    own is a linear layer like others, whose inputs are those behind the last norm.
    """

    source: ModelSource
    names: Vocabulary
    embedding: LayerMethod | None
    head: LayerMethod | None

    @classmethod
    def of(cls, source: ModelSource, plan: Plan) -> Tables | None:
        """None where the plan leaves both dense.

        Raises InputError where the model has not what a method is for, a tied head is to have another method than its embedding,
        or a method cannot compress a layer by itself.
        """
        if plan.embeddings is None and plan.head is None:
            return None
        shell = source.shell()
        names = Vocabulary.of(shell)
        if names is None:
            raise InputError(f"{source.name!r} has no embedding of tokens; leaving embeddings and head out would be right")
        if plan.head is not None and names.head is None:
            raise InputError(f"{source.name!r} has no output head; leaving head out would be right")
        methods = [None if one is None else _single(one) for one in (plan.embeddings, plan.head)]
        if names.tied:
            asked = [one for one in methods if one is not None]
            if any(one != asked[0] for one in asked):
                raise InputError(
                    f"the head of {source.name!r} is its embedding, one table that is stored once; one method for both would be right"
                )
            methods = [asked[0], None]
        if methods[0] is not None:
            scale_of(names.embedding, shell.get_submodule(names.embedding))
        if methods[1] is not None and not isinstance(shell.get_submodule(cast(str, names.head)), nn.Linear):
            kind = type(shell.get_submodule(cast(str, names.head))).__name__
            raise InputError(f"{names.head} is a {kind}, and a head that is a linear layer can be compressed; leave it dense")
        return cls(source, names, *methods)

    def compressed(self) -> set[str]:
        """Names of the modules that do not stay dense."""
        found = {self.names.embedding} if self.embedding is not None else set()
        return found | ({cast(str, self.names.head)} if self.head is not None or (found and self.names.tied) else set())

    def begin(self, store: Store, inputs: str) -> ModelSource:
        """Compress the embedding, unless the store has it; the model that the blocks are compressed in.

        Its embedding is the compressed one where `inputs` are "propagated", else the dense one.
        """
        if self.embedding is None:
            return self.source
        name = self.names.embedding
        if not store.has_part(EMBEDDING):
            stored, entry = _compress_table(self.embedding, name, _weight(self.source, name))
            store.write_block(EMBEDDING, {name: stored}, {"layers": {name: entry}})
        if inputs == "original":
            return self.source
        table = dict(store.layers(EMBEDDING))[name].weight.decode()
        return _WithTables(self.source, {f"{name}.weight": table})

    def finish(self, store: Store, blocks: tuple[str, ...], text: Text, options: StreamOptions) -> None:
        """Compress the head, unless the store has it, when all `blocks` are there; what it reads is what they give."""
        if self.head is None or store.has_part(HEAD):
            return
        name = cast(str, self.names.head)
        weight, statistics = _weight(self.source, name), Statistics()
        if self.head.needs:
            statistics = self._head_inputs(store, blocks, text, options)
        stored = solve_group(self.head, {name: weight}, statistics)[name]
        entry = layer_entry(name, weight, stored, second_moment(statistics), statistics.tokens if self.head.needs else None)
        store.write_block(HEAD, {name: stored}, {"layers": {name: entry}})

    def parts(self) -> tuple[str, ...]:
        """What the store calls the tables that are compressed."""
        return tuple(part for part, method in ((EMBEDDING, self.embedding), (HEAD, self.head)) if method is not None)

    def _head_inputs(self, store: Store, blocks: tuple[str, ...], text: Text, options: StreamOptions) -> Statistics:
        """Statistics of what enters the head behind the dense blocks, or, where inputs are "propagated", the compressed ones."""
        assert self.head is not None
        replaced = Replacements()
        if options.inputs != "original":
            tables = {} if self.embedding is None else dict(store.layers(EMBEDDING))
            norms = {name: value for index in range(len(blocks)) for name, value in store.replaced(index).items()}
            replaced = Replacements(lambda block: store.layers(blocks.index(block)), norms, tables)
        states = LastStates.of(self.source, text, replaced, batch_size=options.batch_size, dtype=options.dtype)
        shell = states.capture.shell
        name = cast(str, self.names.head)
        ear = _Ear(cast(nn.Linear, shell.get_submodule(name)))
        shell.set_submodule(name, ear)
        groups = SharedInputs({name: ear}, sorted(set(self.head.needs), key=lambda need: need.__name__))
        size = options.batch_size
        masks = [None] * -(-len(text[0]) // size) if text[1] is None else text[1].split(size)
        batches = zip(text[0].split(size), states.hidden.split(size), masks, strict=True)
        with torch.no_grad():
            for number, (tokens, hidden, mask) in enumerate(batches):
                groups.mask = mask
                states.capture.logits(tokens, hidden, states.wrapped)
                if number == 0:
                    groups.settle()
        return groups.close()[(name,)]


class _Ear(nn.Module):
    """Stands in for the head: its inputs are heard, and no logits are computed."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


class _WithTables(ChangedSource):
    """A model with other values of some parameters."""

    def __init__(self, source: ModelSource, values: Mapping[str, Tensor]) -> None:
        super().__init__(source)
        self._values = values

    def parameter(self, name: str) -> Tensor:
        return self._values[name] if name in self._values else super().parameter(name)


def _single(method: Method) -> LayerMethod:
    """`method`, which compresses any layer by itself. Raises InputError for one that looks at the whole model, or learns blocks."""
    alone = isinstance(method, LayerMethod) and not method.uses_gradients and type(method).plan is LayerMethod.plan
    if not alone or any(asked is not None for asked in _asked(cast(LayerMethod, method))):
        raise InputError(
            f"{method.name()} compresses no embedding or head by itself: it looks at the blocks or at the whole model; "
            "a method of single layers, such as rtn, hqq or gptq, would be right"
        )
    return cast(LayerMethod, method)


def _asked(method: LayerMethod) -> tuple[object, ...]:
    return method.profiling(), method.stacking(), method.tuning()


def _weight(source: ModelSource, name: str) -> Tensor:
    """float32 `[rows, columns]`. Raises BrokenModelError where a number is not finite."""
    weight = source.parameter(f"{name}.weight").float()
    if not bool(torch.isfinite(weight).all()):
        raise BrokenModelError(f"{name}: the weight is not finite; the model file is broken")
    return weight


def _compress_table(method: LayerMethod, name: str, weight: Tensor) -> tuple[StoredLinear, dict[str, Any]]:
    """Raises InputError where the method rounds what the table multiplies with, or its rows cannot be read alone."""
    statistics = Statistics(*(need(weight.shape[1]) for need in method.needs))
    assume_nothing(statistics)
    stored = solve_group(method, {name: weight}, statistics)[name]
    if stored.activation is not None or stored.offset is not None:
        raise InputError(f"{method.name()} changes the inputs or outputs of a layer, and an embedding has rows alone; rtn would be right")
    stored.weight.taken(torch.zeros(1, dtype=torch.int64))
    return stored, layer_entry(name, weight, stored, None, None)
