"""Experts as other engines have them: each a linear of its own, gate and up apart, by the names of the model's published files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbits.core.errors import InputError
from fewbits.export.checkpoint import read_layer
from fewbits.export.contents import Contents
from fewbits.layers.linear import StoredLinear
from fewbits.models.published import Published, has_experts, published


@dataclass(frozen=True)
class ExpertContents(Contents):
    """Contents by the names of the published files; what the model keeps as one linear, in the pieces of those files."""

    @cached_property
    def _published(self) -> Published:
        return published(self.shell)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(part for layer in self._settings for part in self._published.of_layer(layer))

    @cached_property
    def tables(self) -> tuple[str, ...]:
        return tuple(piece for layer in Contents(self.path).tables for piece in self._published.of_layer(layer))

    def layer(self, name: str) -> StoredLinear:
        """Raises InputError where a part's rows cannot be told from the others'."""
        part = self._published.parts.get(name)
        layer = self._published.in_model(name) if part is None else part[0]
        stored = read_layer(self.source, layer, self._settings[layer])
        if part is not None and len(part[1]) < stored.weight.shape[0]:
            try:
                offset = None if stored.offset is None else stored.offset[part[1]]
                stored = StoredLinear(stored.weight.taken(part[1]), stored.activation, offset)
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
        return self.change(name, stored)

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().dense():
            pieces = self._published.of_layer(name.removesuffix(".weight"))
            if pieces[0] not in self._published.parts:
                yield self._published.names.get(name, name), tensor
                continue
            yield from ((f"{piece}.weight", tensor[self._published.parts[piece][1]]) for piece in pieces)

    def module(self, name: str) -> nn.Module:
        part = self._published.parts.get(name)
        return self.shell.get_submodule(self._published.in_model(name) if part is None else part[0])

    def experts_of(self, layer: str) -> str | None:
        """None: every expert is a linear like others."""
        return None

    def unfit_module(self, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> str | None:
        """Also where experts of one module are compressed in part: engines have all of them in one way."""
        owners: dict[str, list[str]] = {}
        for part, (layer, _) in self._published.parts.items():
            owners.setdefault(layer.rpartition(".")[0].rpartition(".")[0], []).append(part)
        held = set(self.names)
        for owner, parts in owners.items():
            dense = [part for part in parts if part not in held]
            if 0 < len(dense) < len(parts):
                return f"{dense[0]} stayed dense and other experts of {owner} did not, where engines have all of them in one way"
        return super().unfit_module(kinds)

    def dense_linears(self, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> list[str]:
        """Also what routes tokens to experts, which is a linear to other engines."""
        held = set(self.names)
        dense = [name for name, module in self.shell.named_modules() if isinstance(module, kinds) or _routes(module)]
        return [piece for name in dense for piece in self._published.of_layer(name) if piece not in held]


def separated(contents: Contents) -> Contents:
    """`contents` with experts by themselves, where there are any."""
    return ExpertContents(contents.path, contents.change) if has_experts(contents.shell) else contents


def joined(shell: PreTrainedModel, layers: Iterable[tuple[str, StoredLinear]]) -> Iterator[tuple[str, StoredLinear]]:
    """Linears of files as the linears of the model `shell` that they are parts of.

    Raises InputError where a linear of the model is compressed in part, or its parts have no term in common.
    """
    if not has_experts(shell):
        yield from layers
        return
    names = published(shell)
    waiting: dict[str, dict[str, StoredLinear]] = {}
    for name, stored in layers:
        if name not in names.parts:
            yield names.in_model(name), stored
            continue
        layer = names.parts[name][0]
        held = waiting.setdefault(layer, {})
        held[name] = stored
        if len(held) == len(pieces := names.of_layer(layer)):
            yield layer, _stacked(layer, [held[piece] for piece in pieces])
            del waiting[layer]
    if waiting:
        layer, held = next(iter(waiting.items()))
        missing = [piece for piece in names.of_layer(layer) if piece not in held]
        raise InputError(f"{', '.join(held)} is compressed and {', '.join(missing)} is not; both, or none, would be right")


def _stacked(layer: str, pieces: list[StoredLinear]) -> StoredLinear:
    weight = pieces[0].weight
    for piece in pieces[1:]:
        below = weight.stacked(piece.weight)
        if below is None or (piece.activation is None) != (pieces[0].activation is None):
            raise InputError(f"{layer}: its parts are compressed in different ways; the same bits and groups would be right")
        weight = below
    return StoredLinear(weight, pieces[0].activation)


def _routes(module: nn.Module) -> bool:
    """Whether a module has a matrix of its own and is no layer of torch's."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not type(module).__module__.startswith("torch.")
