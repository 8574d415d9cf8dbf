"""GGUF files that are read; the container itself is the package gguf's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fewbits.core.errors import InputError
from fewbits.models.gguf.architecture import Setting
from fewbits.models.gguf.terms import Blocks


def package() -> ModuleType:
    """Raises InputError where the package gguf is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise InputError("GGUF files need the package gguf; pip install 'fewbits[gguf]' would be right") from error
    return gguf


@dataclass(frozen=True)
class GgufFile:
    """A file that is read: its settings by their full names, arrays apart, and its tensors, mapped into memory."""

    path: Path

    @cached_property
    def settings(self) -> dict[str, Setting]:
        fields = self._reader.fields.items()
        return {name: _shortest(field.contents()) for name, field in fields if len(field.types) == 1}

    @cached_property
    def array_names(self) -> frozenset[str]:
        """Settings with a value for every layer or token."""
        return frozenset(name for name, field in self._reader.fields.items() if len(field.types) > 1)

    def array(self, name: str) -> list[Any]:
        """Empty where the file has none of that name."""
        return list(self._reader.fields[name].contents()) if name in self.array_names else []

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor by its name in the file, in the file's order."""
        return {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in self._reader.tensors}

    def tensor(self, name: str) -> Blocks:
        """The file's own bytes of a tensor. Raises KeyError where there is none."""
        return self._blocks(self._by_name[name])

    def type_number(self, name: str) -> int:
        """GGUF's number for how a tensor is stored. Raises KeyError where there is none of that name."""
        return int(self._by_name[name].tensor_type)

    def tensors(self) -> Iterator[tuple[str, Blocks]]:
        """Every tensor by its name, in the file's order."""
        for tensor in self._reader.tensors:
            yield tensor.name, self._blocks(tensor)

    def _blocks(self, tensor: Any) -> Blocks:
        data = torch.from_numpy(np.array(tensor.data)).contiguous().view(torch.uint8)
        return Blocks(int(tensor.tensor_type), data if data.ndim > 1 else data[None], self.shapes[tensor.name])

    @cached_property
    def _by_name(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    @cached_property
    def _reader(self) -> Any:
        try:
            status = self.path.stat()
            return _parsed(self.path.resolve(), status.st_size, status.st_mtime_ns)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise InputError(f"{self.path} cannot be read as GGUF ({error}); it may be cut short: copy it again") from error


@lru_cache(maxsize=1)
def _parsed(path: Path, size: int, changed: int) -> Any:
    """Once for all that a command asks of one file: a vocabulary of a hundred thousand tokens takes seconds."""
    return package().GGUFReader(path)


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that begins as GGUF files do."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _shortest(value: Any) -> Setting:
    """A float32 as the decimal number that it was written from: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
