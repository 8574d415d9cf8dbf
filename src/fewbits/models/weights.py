"""Weights of linear layers, which travel by name: who is sent them reads them from the model's own files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.models.adapter import oriented, weight_matrix
from fewbits.models.source import ModelSource


class Weights:
    """The weights of some `linears` of a model, by full name, computed in `dtype`.

    What is in memory is used where it is. Pickled are the names alone: another process reads the same weights from the folder.
    """

    def __init__(self, source: ModelSource, linears: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
        self.source, self.linears, self.dtype = source, linears, dtype

    def matrices(self) -> dict[str, Tensor]:
        """float32 `[out, in]`, contiguous. Raises InputError where a file is missing or damaged."""
        return {name: self._matrix(name, linear).float().contiguous() for name, linear in self.linears.items()}

    def _matrix(self, name: str, linear: nn.Module) -> Tensor:
        if not linear.get_parameter("weight").is_meta:
            return weight_matrix(linear)
        return oriented(linear, self.source.parameter(f"{name}.weight").to(self.dtype))

    def __reduce__(self) -> Any:
        return _unread, (self.source, tuple(self.linears), self.dtype)


def _unread(source: ModelSource, names: tuple[str, ...], dtype: torch.dtype) -> Weights:
    shell = _shell(source)
    return Weights(source, {name: shell.get_submodule(name) for name in names}, dtype)


@lru_cache(maxsize=1)
def _shell(source: ModelSource) -> nn.Module:
    """Made once for all jobs of a process."""
    return source.shell()
