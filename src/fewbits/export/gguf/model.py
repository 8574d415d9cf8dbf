"""The tensors of a model on their way into a GGUF file and out of it: named, reordered, and blocks made terms again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.contents import Contents
from fewbits.export.gguf.architecture import ARCHITECTURES, ROTARY_FACTORS, Architecture, Setting, rotary_factors
from fewbits.export.gguf.blocks import TYPES
from fewbits.export.gguf.file import GgufFile
from fewbits.export.gguf.terms import PLAIN, Blocks, held, plain, read_term
from fewbits.formats.block_grid import GRIDS
from fewbits.layers.linear import StoredLinear
from fewbits.solvers.block_levels import round_to_blocks

_BY_NUMBER = {kind.number: kind for kind in TYPES.values()}
_DTYPES = {number: dtype for dtype, number in PLAIN.items()}
_EMBEDDINGS = ("token_embd.weight", "output.weight")


def tensors_of(
    contents: Contents, architecture: Architecture, settings: Mapping[str, Setting], embedding: str
) -> Iterator[tuple[str, Blocks]]:
    """Every tensor of the file by its name there: what stayed dense, then the compressed layers.

    `embedding` is the type that embedding and head get, "same" for their own. Raises InputError for a parameter without a name.
    """
    tied = bool(getattr(contents.shell.config, "tie_word_embeddings", False))
    buffers = {name for name, _ in contents.shell.named_buffers()}
    for name, tensor in contents.dense():
        if name in buffers or (tied and name == "lm_head.weight"):
            continue
        written = _tensor_name(architecture, name)
        values = _oriented(contents.shell, name, tensor)
        blocks = _embedding(values, embedding, name) if written in _EMBEDDINGS else plain(_precision(values, written in architecture.plain))
        yield written, blocks.ordered(architecture.row_order(name, len(values), settings))
    factors = rotary_factors(contents.source.config)
    if factors is not None:
        yield ROTARY_FACTORS, plain(factors)
    for layer, stored in contents.layers():
        found = held(stored)
        if isinstance(found, str):
            raise InputError(f"{layer}: {found}")
        name = f"{layer}.weight"
        yield _tensor_name(architecture, name), found.ordered(architecture.row_order(name, found.shape[0], settings))


def read_architecture(file: GgufFile) -> tuple[Architecture, dict[str, Setting]]:
    """What the file says that it holds, and that architecture's settings. Raises InputError where it is not known here."""
    name = str(file.settings.get("general.architecture"))
    found = next((one for one in ARCHITECTURES.values() if one.name == name), None)
    if found is None:
        known = sorted({one.name for one in ARCHITECTURES.values()})
        raise InputError(f"{file.path} holds an architecture {name!r}, and this reader knows {', '.join(known)}")
    settings = {key.removeprefix(f"{name}."): value for key, value in file.settings.items() if key.startswith(f"{name}.")}
    return found, {"attention.head_count_kv": settings.get("attention.head_count", 0)} | settings


def read_layers(file: GgufFile) -> Iterator[tuple[str, StoredLinear]]:
    """The linears of blocks that are stored as block types, by the names of the model's modules."""
    for name, blocks in _named(file):
        if _is_layer(file, name, blocks):
            term = read_term(_BY_NUMBER[blocks.type_number], blocks.data)
            yield name.removesuffix(".weight"), StoredLinear(CompressedTensor((term,)))


def read_dense(file: GgufFile) -> Iterator[tuple[str, Tensor]]:
    """Everything else, as numbers, by the names of the model's parameters; GPT-2's matrices turned as its layers have them."""
    for name, blocks in _named(file):
        if not _is_layer(file, name, blocks):
            values = values_of(blocks)
            turned = file.settings["general.architecture"] == "gpt2" and ".h." in name and values.ndim == 2
            yield name, values.T.contiguous() if turned else values


def values_of(blocks: Blocks) -> Tensor:
    """The numbers that blocks stand for, in the shape of the tensor. Raises InputError for a type that is not known here."""
    if blocks.type_number in _DTYPES:
        return blocks.data.contiguous().view(_DTYPES[blocks.type_number]).reshape(blocks.shape)
    if blocks.type_number not in _BY_NUMBER:
        known = ", ".join(TYPES)
        raise InputError(
            f"a tensor is of GGUF's type number {blocks.type_number}, and this reader knows {known}, float32, fp16 and bfloat16"
        )
    return read_term(_BY_NUMBER[blocks.type_number], blocks.data).decode().reshape(blocks.shape)


def _named(file: GgufFile) -> Iterator[tuple[str, Blocks]]:
    """The file's tensors under the model's names, rows in the model's order, but for what follows from the configuration."""
    architecture, settings = read_architecture(file)
    for written, blocks in file.tensors():
        if written == ROTARY_FACTORS:
            continue
        name = architecture.parameter_name(written)
        if name is None:
            raise InputError(f"{file.path} holds a tensor {written!r}, which this reader does not know of {architecture.name!r} models")
        order = architecture.row_order(name, blocks.shape[0], settings)
        yield name, blocks.ordered(None if order is None else torch.argsort(order))


def _is_layer(file: GgufFile, name: str, blocks: Blocks) -> bool:
    architecture = read_architecture(file)[0]
    tensor = architecture.tensor_name(name) or ""
    return tensor.startswith("blk.") and len(blocks.shape) == 2 and blocks.type_number not in _DTYPES and name.endswith(".weight")


def _tensor_name(architecture: Architecture, name: str) -> str:
    found = architecture.tensor_name(name)
    if found is None:
        raise InputError(f"GGUF has no name for the parameter {name} of {architecture.name!r} models")
    return found


def _oriented(shell: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A dense linear's weight as `[out, in]`."""
    module, _, last = name.rpartition(".")
    return tensor.T if last == "weight" and isinstance(shell.get_submodule(module), Conv1D) else tensor


def _precision(values: Tensor, full: bool) -> Tensor:
    """Vectors in float32, as llama.cpp wants them; matrices as they are unless it wants them in `full` too."""
    return values.float() if values.ndim == 1 or full else values


def _embedding(values: Tensor, kind: str, name: str) -> Blocks:
    if kind == "same":
        return plain(values)
    if kind == "float16":
        halves = values.half()
        if not bool(halves.isfinite().all()):
            raise InputError(f"{name} holds values that fp16 does not reach; gguf:embedding=same would be right")
        return plain(halves)
    if values.shape[1] % GRIDS[kind].span:
        raise InputError(f"{name} has {values.shape[1]} columns, which do not fill blocks of {kind}; gguf:embedding=same would be right")
    found = held(StoredLinear(CompressedTensor((round_to_blocks(values.float(), GRIDS[kind]),))))
    assert isinstance(found, Blocks)
    return found
