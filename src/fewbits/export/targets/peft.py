"""PEFT: low-rank terms as an adapter, beside the rest of each layer in another format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.export.contents import Contents
from fewbits.export.target import Target, get_target
from fewbits.formats.lowrank import LowRank
from fewbits.layers.linear import StoredLinear

_BASE = "base"


@dataclass(frozen=True)
class Peft(Target):
    """A LoRA adapter of every layer whose last term is low rank, and, in the folder `base`, the model without these terms.

    `base` names the format that holds it, with that format's own settings unless told otherwise. Factors are float32 and exact.
    Raises InputError where there is no such format.
    """

    base: str = "gptq"

    readers: ClassVar[str] = "transformers with the package peft and what reads the base's format"
    extra: ClassVar[str | None] = "peft"

    def __post_init__(self) -> None:
        if get_target(self.base).name() == self.name() or get_target(self.base).single_file:
            raise InputError(f"base={self.base!r} is no folder with a model; gptq, compressed-tensors or dense would be right")

    def refuses(self, stored: StoredLinear) -> str | None:
        if _branch(stored) is not None and _is_surrounded(stored):
            return "a low-rank branch behind transforms or rounded inputs is no adapter"
        return get_target(self.base).refuses(_without_branch(stored))

    def refuses_model(self, contents: Contents) -> str | None:
        if all(_branch(stored) is None for _, stored in contents.layers()):
            return "no layer has a low-rank branch beside other terms"
        return get_target(self.base).refuses_model(_base(contents))

    def requantize(self, stored: StoredLinear) -> StoredLinear | None:
        """The nearest that the base's format holds of the other terms, beside the branch as it is."""
        if (branch := _branch(stored)) is None or _is_surrounded(stored):
            return get_target(self.base).requantize(stored)
        made = get_target(self.base).requantize(_without_branch(stored))
        return None if made is None else replace(made, weight=replace(made.weight, terms=(*made.weight.terms, branch)))

    def write(self, contents: Contents, destination: Path) -> None:
        from fewbits.export.peft import write_factors  # says which extra is missing

        (destination / _BASE).mkdir()
        get_target(self.base).write(_base(contents), destination / _BASE)
        branches = ((name, branch) for name, stored in contents.layers() if (branch := _branch(stored)) is not None)
        write_factors({name: (branch.left.decode(), branch.right.decode()) for name, branch in branches}, _BASE, destination)

    def written(self, destination: Path) -> Iterator[tuple[str, Tensor]]:
        yield from super().written(destination)
        yield from get_target(self.base).written(destination / _BASE)


def _is_surrounded(stored: StoredLinear) -> bool:
    """Whether something changes what the terms read or what becomes of their sum."""
    return bool(stored.weight.input_transforms or stored.weight.output_transforms or stored.activation is not None)


def _branch(stored: StoredLinear) -> LowRank | None:
    """The low-rank term behind others."""
    *others, last = stored.weight.terms
    return last if others and isinstance(last, LowRank) else None


def _without_branch(stored: StoredLinear) -> StoredLinear:
    if _branch(stored) is None:
        return stored
    return replace(stored, weight=replace(stored.weight, terms=stored.weight.terms[:-1]))


def _base(contents: Contents) -> Contents:
    """The same model without its branches."""
    return replace(contents, change=lambda name, stored: _without_branch(contents.change(name, stored)))
