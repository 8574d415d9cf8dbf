"""The contract of a format that other engines read, and which formats there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from safetensors import safe_open
from torch import Tensor

from fewbits.core.config import configure, read_spec, suggest
from fewbits.core.errors import InputError
from fewbits.core.registry import only_class, walk
from fewbits.export.contents import Contents
from fewbits.layers.linear import StoredLinear

_PACKAGE = "fewbits.export.targets"


class Target(ABC):
    """One format: a frozen dataclass in a file of its own, whose fields are the format's settings.

    It sees terms, transforms and activation quantizers, never which method made them. `run.export` asks `refuses` about every
    layer and `refuses_model` about the whole before anything is written, writes beside and renames, and audits what was written.
    """

    readers: ClassVar[str]  # one line: who runs such files
    extra: ClassVar[str | None] = None  # which extra of fewbits writing needs
    separates_experts: ClassVar[bool] = False  # whether experts are linears by themselves, as the model's published files have them
    single_file: ClassVar[bool] = False  # whether the output is one file, not a folder
    holds_tables: ClassVar[bool] = False  # whether embedding and head may be compressed, not only linears of blocks

    @classmethod
    def name(cls) -> str:
        """The stem of the format's file, with hyphens."""
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    @abstractmethod
    def refuses(self, stored: StoredLinear) -> str | None:
        """Why the format cannot hold this layer exactly, naming the term or transform and what stops it; None where it can.

        Of `offset` nothing need be said: it goes into the layer's bias, or `run.export` refuses the layer.
        """

    def refuses_model(self, contents: Contents) -> str | None:
        """Why the format cannot hold the model, though it holds each layer: an unknown architecture, widths that differ."""
        return None

    def requantize(self, stored: StoredLinear) -> StoredLinear | None:
        """What the format holds instead of a layer that it refuses: nearest on its grid. None where there is no such thing.

        Called on request only; what is lost of the weight is measured by the caller.
        """
        return None

    @abstractmethod
    def write(self, contents: Contents, destination: Path) -> None:
        """Write everything that an engine needs to `destination`: an empty folder, or, `single_file`, a path without a file."""

    def written(self, destination: Path) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that `write` wrote, by the name that the audit may give: those of all safetensors unless overridden."""
        for path in sorted(destination.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in list(file.keys()):
                    yield name, file.get_tensor(name)

    def recognizes(self, path: Path) -> bool:
        """Whether `path` is a model in this format that `read` reads."""
        return False

    def read(self, path: Path) -> Iterator[tuple[str, StoredLinear]]:
        """The compressed linears of a model in this format, exactly, by the names of the model's modules: the inverse of `write`.

        Raises InputError where the file is damaged or holds what has no exact term.
        """
        raise InputError(f"{path}: {self.name()} is written and not read")


def list_targets() -> list[str]:
    """Names of all formats, sorted; none is imported."""
    return sorted(stem.replace("_", "-") for stem in walk(_PACKAGE, "*.py"))


def get_target(spec: str) -> Target:
    """The format of "NAME" or "NAME:field=value,...". Raises InputError with a suggestion where there is none, or no such field."""
    name, values = read_spec(spec)
    found = {stem.replace("_", "-"): module for stem, module in walk(_PACKAGE, "*.py").items()}
    if (key := name.replace("_", "-")) not in found:
        raise InputError(f"no format is called {name!r}; {suggest(name, sorted(found))}")
    return configure(only_class(found[key], Target), values)  # type: ignore[type-abstract]
