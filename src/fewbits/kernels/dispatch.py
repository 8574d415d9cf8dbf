"""Who computes: a kernel where one serves the tensors at hand, or nobody, and the caller's torch definition does.

On the CPU they are the compiled ones (`native.py`), on a GPU those of `triton/`.

The kernels are the custom operators `fewbits::multiply` and `fewbits::decode`, so that torch.compile keeps one graph.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fewbits.kernels import native
from fewbits.kernels.layout import MIXED, SIGNED, Description, entries, has_codes, has_codewords, lasting, lies_in_lines
from fewbits.kernels.triton import gpu

FEW_VECTORS = 32  # up to which kernels take codes as they are; above, those that decode a panel of rows for all vectors
_FEW_OF_CODEWORDS = 12  # where one is loaded for every code: with 16 vectors and 4096 x 4096 decoding was faster
_VECTORS_AT_ONCE = 256  # that matrices which are never decoded are multiplied with
_MOST_VECTORS = {SIGNED: 512, MIXED: 256}  # with 1024 and 512 torch was faster, 2048 x 2048 with rank 16 and 1024 x 1024
_SPARSE_SHARE = 64  # one entry in so many is few enough for sparse rows to be faster than decoded ones
_TILE_BYTES = 4 * 2**20  # of decoded weights that are in memory at once

_rooms = threading.local()
_KEPT: WeakKeyDictionary[object, native.Sums | Literal[False]] = WeakKeyDictionary()
counts: Counter[str] = Counter()  # how often each path computed in this process: "multiply", "decode", "definition"


def multiply(matrix: Description | None, inputs: Tensor) -> Tensor | None:
    """`inputs [..., columns] @ W.T` in the dtype of the inputs; None where the definition must serve.

    It must where gradients are asked for, on other devices, and where no kernel was built or, on a GPU, triton is missing.
    """
    if matrix is None or not _serves(matrix, inputs.dtype, (inputs, *matrix.tensors)):
        return None
    if inputs.shape[-1] != matrix.layout[1]:
        return None  # the definition says what is wrong
    plain = type(inputs) is Tensor and not torch.compiler.is_compiling()
    function = _multiply if plain else _multiply_op
    vectors = inputs.numel() // inputs.shape[-1]
    if vectors <= _few_vectors(matrix) or (has_codes(matrix) and (on_gpu(inputs) or _takes_many(inputs.dtype))):
        return function(inputs, matrix.tensors, matrix.layout)
    if vectors <= _most_vectors(matrix):
        some = inputs.reshape(-1, inputs.shape[-1]).split(_VECTORS_AT_ONCE)
        return torch.cat([function(part, matrix.tensors, matrix.layout) for part in some]).unflatten(0, inputs.shape[:-1])
    if not has_codes(matrix) and not has_codewords(matrix):
        counts["definition"] += 1
        return None
    rows, columns = matrix.layout[:2]
    step = min(rows, max(1, _TILE_BYTES // (columns * inputs.element_size())))
    room = _room(step, columns, inputs.dtype) if plain else None
    parts = [inputs @ _rows(matrix, first, min(first + step, rows), inputs.dtype, room).T for first in range(0, rows, step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def multiply_term(term: object, describe: Callable[[], Description | None], inputs: Tensor) -> Tensor | None:
    """`multiply` of how a term is described, which never changes; what was seen of it is kept as long as it lives.

    A product with few vectors then is little more than the kernel's call.
    """
    found = kept_sums(term, lambda isa: _look_at(isa, describe), inputs) if not torch.compiler.is_compiling() else None
    if found is None:
        return multiply(describe(), inputs)
    counts["multiply"] += 1
    return found.multiply(inputs)[0]


def kept_sums(key: object, look: Callable[[str], native.Sums | None], inputs: Tensor) -> native.Sums | None:
    """What `look` sees with an instruction set, kept as long as `key` lives, if few of these inputs meet it and no gradient is asked for.

    None where it sees nothing that could be kept, which is kept, too.
    """
    few = type(inputs) is Tensor and 0 < inputs.numel() <= FEW_VECTORS * inputs.shape[-1]
    kept = _KEPT.get(key)
    if kept is False or not few or native.number(inputs.dtype) is None or inputs.device.type != "cpu" or on_gpu(inputs):
        return None
    isa = native.chosen()
    if isa is None:
        return None
    if kept is None or kept.isa != isa or not kept.is_in_place():
        kept = _KEPT[key] = look(isa) or False
        if kept is False:
            return None
    fits = kept.columns == inputs.shape[-1] and inputs.numel() <= kept.most_numbers
    return None if not fits or _gradients_are_asked_for((inputs, *kept.tensors)) else kept


def may_be_kept(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels of the CPU read tensors where they are."""
    return all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors)


def _look_at(isa: str, describe: Callable[[], Description | None]) -> native.Sums | None:
    """None where no kernel of the CPU reads what is stored, or a number is made anew for each product."""
    matrix = lasting(describe)
    if matrix is None or min(matrix.layout[:2]) == 0 or not may_be_kept(matrix.tensors):
        return None
    return native.Sums.of_matrix(isa, matrix.tensors, matrix.layout, _few_vectors(matrix))


def _few_vectors(matrix: Description) -> int:
    return _FEW_OF_CODEWORDS if has_codewords(matrix) and not lies_in_lines(matrix) else FEW_VECTORS


def _most_vectors(matrix: Description) -> float:
    """Up to how many vectors a kernel reads what torch's matrix product would need decoded for less than that takes.

    Any number of sparse rows of few entries; factors with signs and groups of two widths, whose weights are made anew for every few
    hundred vectors, up to what was seen to be faster.
    """
    if matrix.layout[2] == 0 and matrix.layout[3] in _MOST_VECTORS:
        return _MOST_VECTORS[matrix.layout[3]]
    return math.inf if _SPARSE_SHARE * entries(matrix) < matrix.layout[0] * matrix.layout[1] else _few_vectors(matrix)


def decode(matrix: Description | None, dtype: torch.dtype) -> Tensor | None:
    """W `[rows, columns]`, bit for bit as the definition has it; None where the definition must serve."""
    if matrix is None or not _serves(matrix, dtype, matrix.tensors):
        return None
    return _rows(matrix, 0, matrix.layout[0], dtype)


def _room(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory of this thread for a tile `[rows, columns]`: what the system gives anew each time costs more than the tile's decoding."""
    size = rows * columns * dtype.itemsize
    kept = getattr(_rooms, "room", None)
    if kept is None or kept.numel() < size:
        kept = _rooms.room = native.room_like(torch.empty(max(size, _TILE_BYTES), dtype=torch.uint8, device="meta"))
    return kept[:size].view(dtype).view(rows, columns)


def _rows(matrix: Description, first: int, last: int, dtype: torch.dtype, room: Tensor | None = None) -> Tensor:
    """Decoded rows, in `room` where there is some."""
    if room is not None:
        return _decode(matrix.tensors, matrix.layout, first, last, dtype, room[: last - first])
    plain = type(matrix.tensors[0]) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    function = _decode if plain else _decode_op
    return function(matrix.tensors, matrix.layout, first, last, dtype)


def _serves(matrix: Description, dtype: torch.dtype, tensors: tuple[Tensor, ...]) -> bool:
    there = min(matrix.layout[:2]) > 0 and all(tensor.is_contiguous() for tensor in matrix.tensors)
    if there and on_gpu(tensors[0]):
        return counted(_usable_on_gpu(matrix, dtype, tensors))
    return counted(there and usable(dtype, tensors))


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is where Triton kernels run."""
    return tensor.device.type in gpu.DEVICES


def _usable_on_gpu(matrix: Description, dtype: torch.dtype, tensors: tuple[Tensor, ...]) -> bool:
    if native.number(dtype) is None or any(one.device != tensors[0].device for one in tensors):
        return False
    return gpu.serves(matrix.layout) and not _gradients_are_asked_for(tensors)


def counted(served: bool) -> bool:
    """`served` as it is, and a note where the definition must serve."""
    if not served and not torch.compiler.is_compiling():
        counts["definition"] += 1
    return served


def usable(dtype: torch.dtype, tensors: tuple[Tensor, ...]) -> bool:
    """Whether kernels compute with numbers of this dtype and these tensors: on the CPU, and where no gradient is asked for."""
    if native.number(dtype) is None or not _native_is_chosen() or any(tensor.device.type != "cpu" for tensor in tensors):
        return False
    return not _gradients_are_asked_for(tensors)


def _gradients_are_asked_for(tensors: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@torch.compiler.assume_constant_result
def _native_is_chosen() -> bool:
    return native.extension() is not None and native.chosen() is not None


@torch.compiler.assume_constant_result
def _takes_many(dtype: torch.dtype) -> bool:
    isa = native.chosen()
    return isa is not None and native.takes_many(isa, dtype)


def _multiply(inputs: Tensor, tensors: list[Tensor] | tuple[Tensor, ...], layout: list[int] | tuple[int, ...]) -> Tensor:
    counts["multiply"] += 1
    if on_gpu(inputs):
        return gpu.multiply(tensors, layout, inputs)
    isa = native.chosen()
    assert isa is not None
    return native.multiply(isa, tensors, layout, inputs)


def _decode(
    tensors: list[Tensor] | tuple[Tensor, ...],
    layout: list[int] | tuple[int, ...],
    first: int,
    last: int,
    dtype: torch.dtype,
    outputs: Tensor | None = None,
) -> Tensor:
    counts["decode"] += 1
    if on_gpu(tensors[0]):
        return gpu.decode(tensors, layout, (first, last), dtype)
    isa = native.chosen()
    assert isa is not None
    return native.decode(isa, tensors, layout, (first, last), dtype, outputs)


_LIBRARY = torch.library.Library("fewbits", "DEF")
_LIBRARY.define("multiply(Tensor inputs, Tensor[] tensors, int[] layout) -> Tensor")
_LIBRARY.define("decode(Tensor[] tensors, int[] layout, int first, int last, ScalarType dtype) -> Tensor")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("multiply", _multiply, _key)
    _LIBRARY.impl("decode", _decode, _key)
_multiply_op = torch.ops.fewbits.multiply.default
_decode_op = torch.ops.fewbits.decode.default


@torch.library.register_fake("fewbits::multiply", lib=_LIBRARY)
def _shape_of_product(inputs: Tensor, tensors: list[Tensor], layout: list[int]) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], layout[0])


@torch.library.register_fake("fewbits::decode", lib=_LIBRARY)
def _shape_of_rows(tensors: list[Tensor], layout: list[int], first: int, last: int, dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(last - first, layout[1], dtype=dtype)
