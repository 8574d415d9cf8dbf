"""The tensors of a model on their way into a GGUF file: named, reordered, made blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.contents import Contents
from fewbits.formats.block_grid import GRIDS
from fewbits.layers.linear import StoredLinear
from fewbits.models.gguf.architecture import ROTARY_FACTORS, Architecture, Setting, rotary_factors
from fewbits.models.gguf.tensors import TABLES
from fewbits.models.gguf.terms import Blocks, held, plain
from fewbits.solvers.block_levels import round_to_blocks


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
        blocks = _embedding(values, embedding, name) if written in TABLES else plain(_precision(values, written in architecture.plain))
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
