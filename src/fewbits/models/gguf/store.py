"""A GGUF file in the place of a model's folder: configuration, tokenizer, and tensors that are read when asked for."""

from __future__ import annotations

import contextlib
import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from fewbits.core.errors import InputError
from fewbits.models.gguf.config import config_of
from fewbits.models.gguf.file import GgufFile
from fewbits.models.gguf.tensors import GgufTensors
from fewbits.models.gguf.vocabulary import tokenizer_of


class GgufStore:
    """As `models.folder.Folder`. Blocks of codes are numbers here; `GgufTensors.layers` gives them as they are."""

    def __init__(self, path: Path) -> None:
        self.path, self._held = path, GgufTensors(GgufFile(path))

    @cached_property
    def config(self) -> PretrainedConfig:
        """Raises InputError where the file's model is not known here."""
        return config_of(self._held)

    def tokenizer(self) -> Any:
        """Raises InputError where the file holds none that can be read."""
        return tokenizer_of(self._held.file)

    def names(self) -> tuple[str, ...]:
        """Of all tensors, as the model calls them."""
        return tuple(self._held.names)

    def tensor(self, name: str) -> Tensor:
        """One tensor as numbers, in the model's shape. Raises InputError where it is missing."""
        if name not in self._held.names:
            raise InputError(f"{self.path} holds no tensor {name!r}")
        return self._held.values(name)

    def held_open(self) -> contextlib.AbstractContextManager[None]:
        """The file is mapped as long as this is."""
        return contextlib.nullcontext()

    def file_bytes(self) -> int:
        return self.path.stat().st_size

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the file."""
        with open(self.path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def write_companions(self, folder: Path) -> None:
        """Configuration and tokenizer as the files that a folder has."""
        self.config.save_pretrained(folder)
        self.tokenizer().save_pretrained(folder)
