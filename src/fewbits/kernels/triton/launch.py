"""Calls of the kernels with tensors: sizes are checked, tables that are not numbers are made ones, and tiles are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fewbits.kernels import layout as kinds
from fewbits.kernels.triton import products
from fewbits.kernels.triton.structure import SparseRows, Structure, Table, read

FEW_VECTORS = 8  # up to which weights are never rounded; above, tiles are, as tensor cores take them
_COLUMNS_AT_ONCE = 256  # of a tile that few vectors are multiplied with
_FUSED = {"enable_fp_fusion": True}  # a product and a sum are one instruction; Triton 3.9 warns where that is not said
_TILE = 64  # rows and columns of a tile that many vectors are multiplied with


@dataclass(frozen=True)
class _Operands:
    """What every kernel that reads codes is handed."""

    parts: tuple[Tensor, ...]
    strides: tuple[int, ...]
    form: dict[str, int | bool]


def multiply(tensors: Sequence[Tensor], layout: Sequence[int], inputs: Tensor) -> Tensor:
    """`inputs [..., columns] @ W.T`, W `[rows, columns]` described by `layout`, in the dtype of the inputs.

    Raises ValueError where the tensors do not have the sizes that the layout says, or no kernel serves them.
    """
    matrix = _known(layout)
    if inputs.shape[-1] != matrix.columns:
        raise ValueError(f"inputs of {inputs.shape[-1]} features do not fit a matrix of {matrix.columns} columns")
    inputs = inputs.contiguous()
    outputs = inputs.new_empty(*inputs.shape[:-1], matrix.rows)
    vectors = inputs.numel() // matrix.columns
    if vectors == 0:
        return outputs
    with _device_of(inputs):
        if isinstance(matrix, SparseRows):
            _multiply_sparse(matrix, tensors, inputs, outputs)
        else:
            _multiply_coded(matrix, tensors, inputs, outputs)
    return outputs


def decode(tensors: Sequence[Tensor], layout: Sequence[int], rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows first to last (not included) of the matrix, dense `[last - first, columns]`.

    Raises ValueError where the tensors do not have the sizes that the layout says, or no kernel serves them.
    """
    matrix = _known(layout)
    if isinstance(matrix, SparseRows):
        raise ValueError("sparse rows are not decoded by a kernel")
    if not 0 <= rows[0] <= rows[1] <= matrix.rows:
        raise ValueError(f"rows {rows[0]} to {rows[1]} are not in a matrix of {matrix.rows}")
    with _device_of(tensors[matrix.place]):
        return _decode(matrix, tensors, rows, dtype)


def _known(layout: Sequence[int]) -> Structure | SparseRows:
    found = read(tuple(layout))
    if found is None:
        raise ValueError(f"no kernel for a GPU reads the layout {list(layout)}")
    return found


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels run on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _multiply_coded(matrix: Structure, tensors: Sequence[Tensor], inputs: Tensor, outputs: Tensor) -> None:
    operands, vectors = _operands(matrix, tensors), inputs.numel() // matrix.columns
    if vectors <= FEW_VECTORS:
        kernel, together, warps = products.multiply_few, triton.next_power_of_2(vectors), 4
        rows, block = (8 if together <= 4 else 4), min(_COLUMNS_AT_ONCE, max(16, triton.next_power_of_2(matrix.columns)))
    else:
        # With half as many warps the registers of a thread do not hold its part of a tile.
        kernel, together, warps = products.multiply_many, min(_TILE, max(16, triton.next_power_of_2(vectors))), 8
        rows = block = _TILE
    grid = (triton.cdiv(matrix.rows, rows), triton.cdiv(vectors, together))
    sizes = (vectors, matrix.rows, matrix.columns)
    tile = {"VECTORS": together, "ROWS": rows, "BLOCK": block}
    kernel[grid](inputs, outputs, operands.parts, operands.strides, sizes, **operands.form, **tile, **_FUSED, num_warps=warps)


def _multiply_sparse(matrix: SparseRows, tensors: Sequence[Tensor], inputs: Tensor, outputs: Tensor) -> None:
    values, indices, pointers = tensors
    _check(values, matrix.dtype, matrix.entries)
    _check(indices, matrix.index_dtype, matrix.entries)
    _check(pointers, torch.int32, matrix.rows + 1)
    rows, block = 8, 32
    grid = (inputs.numel() // matrix.columns, triton.cdiv(matrix.rows, rows))
    sizes = (matrix.rows, matrix.columns, matrix.entries)
    products.multiply_sparse[grid](inputs, outputs, (values, indices, pointers), sizes, ROWS=rows, BLOCK=block, **_FUSED)


def _decode(matrix: Structure, tensors: Sequence[Tensor], rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
    first, last = rows
    outputs = tensors[matrix.place].new_empty(last - first, matrix.columns, dtype=dtype)
    if outputs.numel() == 0:
        return outputs
    operands, at_once = _operands(matrix, tensors), 8
    block = min(_COLUMNS_AT_ONCE, max(16, triton.next_power_of_2(matrix.columns)))
    grid = (triton.cdiv(last - first, at_once), triton.cdiv(matrix.columns, block))
    sizes = (first, last, matrix.columns)
    products.decode_rows[grid](outputs, operands.parts, operands.strides, sizes, **operands.form, ROWS=at_once, BLOCK=block, **_FUSED)
    return outputs


def _operands(matrix: Structure, tensors: Sequence[Tensor]) -> _Operands:
    codes = tensors[matrix.place]
    _check(codes, matrix.dtype, matrix.rows * matrix.row_width)
    parts, strides = [codes], [matrix.row_width]
    for table in (matrix.levels, matrix.scales, matrix.zeros):
        if table is None:
            found, width = codes, 0  # never read
        else:
            found, width = _numbers(table, tensors, matrix.bits)
        parts.append(found)
        strides.append(0 if table is None or table.rows == 1 else width)
    form = {
        "BITS": matrix.bits,
        "GROUP": 0 if matrix.groups == 1 else matrix.group,  # whole rows share one kernel, whatever their length
        "GRID": matrix.grid,
        "SCALED": matrix.scales is not None,
    }
    return _Operands(tuple(parts), tuple(strides), form)


def _numbers(table: Table, tensors: Sequence[Tensor], bits: int) -> tuple[Tensor, int]:
    """A table as kernels read it, and the elements of its rows."""
    stored = tensors[table.place]
    if table.inner is not None:  # a second level of codes is small beside the first
        return _decode(table.inner, tensors, (0, table.rows), torch.float32), table.columns
    width = (table.columns * bits + 7) // 8 if table.kind == kinds.PACKED else table.columns
    _check(stored, table.dtype, table.rows * width)
    if table.kind == kinds.TABLE:
        lookup = tensors[table.place + 1]
        _check(lookup, torch.float32, 256)
        return lookup[stored.int()], width
    return stored, width


def _check(tensor: Tensor, dtype: torch.dtype, count: int) -> None:
    if tensor.dtype != dtype or tensor.numel() != count or not tensor.is_contiguous():
        raise ValueError(f"a tensor {list(tensor.shape)} of {tensor.dtype} is not {count} numbers of {dtype} that lie together")
