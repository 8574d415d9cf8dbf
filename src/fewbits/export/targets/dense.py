"""Dense: every weight written out, the folder that every engine loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.contents import Contents
from fewbits.export.folder import copy_companions, write_config, write_shards
from fewbits.export.target import Target
from fewbits.formats.dense import Dense as DenseTerm
from fewbits.layers.linear import StoredLinear


@dataclass(frozen=True)
class Dense(Target):
    """Weights and all other parameters in one dtype. float32 holds every compressed layer exactly; 16 bits only some."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    holds_tables: ClassVar[bool] = True
    readers: ClassVar[str] = "every engine that reads Hugging Face folders; the size is that of the dense model"

    def refuses(self, stored: StoredLinear) -> str | None:
        if stored.activation is not None:
            return f"its inputs are rounded ({stored.activation.kind}), which a dense layer does not do"
        if self.dtype != "float32":
            weight = stored.weight.decode()
            if not torch.equal(weight.to(self._dtype).float(), weight):
                return f"its values are not exact in {self.dtype}"
        return None

    def requantize(self, stored: StoredLinear) -> StoredLinear | None:
        """The nearest numbers of the dtype, and inputs as they are; None where a value is too large for it."""
        values = stored.weight.decode(self._dtype)
        return StoredLinear(CompressedTensor((DenseTerm(values),)), None, stored.offset) if bool(values.isfinite().all()) else None

    def write(self, contents: Contents, destination: Path) -> None:
        copy_companions(contents.path, destination)
        write_shards(destination, self._tensors(contents))
        write_config(destination, contents.config | {"dtype": self.dtype})

    @property
    def _dtype(self) -> torch.dtype:
        return cast(torch.dtype, getattr(torch, self.dtype))

    def _tensors(self, contents: Contents) -> Iterator[tuple[str, Tensor]]:
        """Everything under the names and in the shapes of the model's own parameters; experts stacked as they were."""
        stacks: dict[str, dict[int, Tensor]] = {}
        for name, tensor in self._separate(contents):
            owner, _, index = name.removesuffix(".weight").rpartition(".")
            if not name.endswith(".weight") or not index.isdigit() or contents.experts_of(f"{owner}.{index}") is None:
                yield name, tensor
                continue
            held = stacks.setdefault(owner, {})
            held[int(index)] = tensor
            if len(held) == len(contents.shell.get_submodule(owner)):  # type: ignore[arg-type]
                yield owner, torch.stack([held[expert] for expert in range(len(held))])
                del stacks[owner]

    def _separate(self, contents: Contents) -> Iterator[tuple[str, Tensor]]:
        for name, stored in contents.layers():
            weight = stored.weight.decode(self._dtype)
            yield f"{name}.weight", weight.T if isinstance(contents.shell.get_submodule(name), Conv1D) else weight
        for name, tensor in contents.dense():
            made = tensor.to(self._dtype) if tensor.is_floating_point() else tensor
            if tensor.is_floating_point() and not bool(made.isfinite().all()):
                raise InputError(f"{name} holds values that {self.dtype} does not reach; dense:dtype=float32 would be right")
            yield name, made
