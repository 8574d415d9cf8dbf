"""The tensors of a GGUF file by the names of the model's parameters, in the model's order: as numbers, or blocks made terms again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.layers.linear import StoredLinear
from fewbits.models.gguf.architecture import ARCHITECTURES, ROTARY_FACTORS, Architecture, Setting
from fewbits.models.gguf.blocks import TYPES
from fewbits.models.gguf.file import GgufFile
from fewbits.models.gguf.terms import PLAIN, Blocks, read_term

_BY_NUMBER = {kind.number: kind for kind in TYPES.values()}
TABLES = ("token_embd.weight", "output.weight")  # of embedding and head
_DTYPES = {number: dtype for dtype, number in PLAIN.items()}


@dataclass(frozen=True)
class GgufTensors:
    """Names are those of parameters in transformers. Raises InputError where the file holds what is not known here."""

    file: GgufFile

    @cached_property
    def architecture(self) -> Architecture:
        """What the file says that it holds."""
        name = str(self.file.settings.get("general.architecture"))
        found = next((one for one in ARCHITECTURES.values() if one.name == name), None)
        if found is None:
            known = sorted({one.name for one in ARCHITECTURES.values()})
            raise InputError(f"{self.file.path} holds an architecture {name!r}, and this reader knows {', '.join(known)}")
        return found

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """The architecture's own, without its name in front."""
        start = f"{self.architecture.name}."
        found = {key.removeprefix(start): value for key, value in self.file.settings.items() if key.startswith(start)}
        return {"attention.head_count_kv": found.get("attention.head_count", 0)} | found

    @cached_property
    def names(self) -> dict[str, str]:
        """The file's name of every parameter, but for what follows from the configuration."""
        found, kind = dict[str, str](), self.architecture.name
        for written in self.file.shapes:
            name = self.architecture.parameter_name(written)
            if name is not None:
                found[name] = written
            elif written != ROTARY_FACTORS:
                raise InputError(f"{self.file.path} holds a tensor {written!r}, which this reader does not know of {kind!r} models")
        return found

    def layers(self) -> Iterator[tuple[str, StoredLinear]]:
        """What is stored as block types of the blocks' linears, the embedding and the head, by the names of the model's modules."""
        for name in self.names:
            if self._is_layer(name):
                yield name.removesuffix(".weight"), StoredLinear(CompressedTensor((_term(self._blocks(name)),)))

    def values(self, name: str) -> Tensor:
        """The numbers of a parameter, in the shape that the model has it in. Raises KeyError where there is none of that name."""
        values = values_of(self._blocks(name))
        return values.T.contiguous() if self._is_turned(name, values) else values

    def factors(self) -> Tensor:
        """What each pair's rotary frequency is divided by, float32 `[head size / 2]`. Raises KeyError where the file says nothing of it."""
        return values_of(self.file.tensor(ROTARY_FACTORS))

    def _blocks(self, name: str) -> Blocks:
        blocks = self.file.tensor(self.names[name])
        order = self.architecture.row_order(name, blocks.shape[0], self.settings)
        return blocks.ordered(None if order is None else torch.argsort(order))

    def _is_turned(self, name: str, values: Tensor) -> bool:
        """GPT-2's layers have their matrices turned."""
        return self.architecture.name == "gpt2" and ".h." in name and values.ndim == 2

    def _is_layer(self, name: str) -> bool:
        written = self.names[name]
        weight = written in TABLES or (written.startswith("blk.") and name.endswith(".weight"))
        return weight and len(self.file.shapes[written]) == 2 and self.file.type_number(written) not in _DTYPES


def values_of(blocks: Blocks) -> Tensor:
    """The numbers that blocks stand for, in the shape of the tensor. Raises InputError for a type that is not known here."""
    if blocks.type_number in _DTYPES:
        return blocks.data.contiguous().view(_DTYPES[blocks.type_number]).reshape(blocks.shape)
    return _term(blocks).decode().reshape(blocks.shape)


def _term(blocks: Blocks) -> Term:
    if blocks.type_number not in _BY_NUMBER:
        known = ", ".join(TYPES)
        raise InputError(
            f"a tensor is of GGUF's type number {blocks.type_number}, and this reader knows {known}, float32, fp16 and bfloat16"
        )
    return read_term(_BY_NUMBER[blocks.type_number], blocks.data)
