"""Kernels of products and of decoding: they read a matrix's codes as they lie, sums are float32, outputs have the inputs' dtype."""

import triton
import triton.language as tl

from fewbits.kernels.triton.weights import product, read_weights, rounded


@triton.jit
def multiply_few(  # noqa: PLR0913 - a launch is handed every pointer and size
    inputs,
    outputs,
    parts,
    strides,
    sizes,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GRID: tl.constexpr,
    SCALED: tl.constexpr,
    VECTORS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`outputs [vectors, rows] = inputs [vectors, columns] @ W.T` for VECTORS vectors and ROWS rows a program; W is never rounded."""
    vectors, all_rows, columns = sizes
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(1).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    there, asked = rows < all_rows, which < vectors
    total = tl.zeros((VECTORS, ROWS, BLOCK), dtype=tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        weights = read_weights(parts, strides, rows, there, first, columns, BITS, GROUP, GRID, SCALED, BLOCK)
        weights = tl.where((column < columns)[None, :], weights, 0.0)
        where = asked[:, None] & (column < columns)[None, :]
        some = tl.load(inputs + which[:, None] * columns + column[None, :], mask=where, other=0).to(tl.float32)
        total += weights[None, :, :] * some[:, None, :]
    place = outputs + which[:, None] * all_rows + rows[None, :]
    tl.store(place, rounded(tl.sum(total, axis=2), outputs.dtype.element_ty), mask=asked[:, None] & there[None, :])


@triton.jit
def multiply_many(  # noqa: PLR0913 - a launch is handed every pointer and size
    inputs,
    outputs,
    parts,
    strides,
    sizes,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GRID: tl.constexpr,
    SCALED: tl.constexpr,
    VECTORS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same as a product of tiles: decoded tiles are rounded to the inputs' dtype, as the definition rounds the weights."""
    vectors, all_rows, columns = sizes
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(1).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    there, asked = rows < all_rows, which < vectors
    total = tl.zeros((VECTORS, ROWS), dtype=tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        weights = read_weights(parts, strides, rows, there, first, columns, BITS, GROUP, GRID, SCALED, BLOCK)
        weights = rounded(tl.where((column < columns)[None, :], weights, 0.0), inputs.dtype.element_ty)
        where = asked[:, None] & (column < columns)[None, :]
        some = tl.load(inputs + which[:, None] * columns + column[None, :], mask=where, other=0)
        total = product(some, tl.trans(weights), total)
    place = outputs + which[:, None] * all_rows + rows[None, :]
    tl.store(place, rounded(total, outputs.dtype.element_ty), mask=asked[:, None] & there[None, :])


@triton.jit
def decode_rows(  # noqa: PLR0913 - a launch is handed every pointer and size
    outputs,
    parts,
    strides,
    sizes,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GRID: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`outputs [last - first, columns]`: rows first to last (not included) of W."""
    from_row, to_row, columns = sizes
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows, first = from_row + place, tl.program_id(1) * BLOCK
    there, column = rows < to_row, first + tl.arange(0, BLOCK)
    weights = read_weights(parts, strides, rows, there, first, columns, BITS, GROUP, GRID, SCALED, BLOCK)
    where = there[:, None] & (column < columns)[None, :]
    tl.store(outputs + place[:, None] * columns + column[None, :], rounded(weights, outputs.dtype.element_ty), mask=where)


@triton.jit
def multiply_sparse(inputs, outputs, parts, sizes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One vector times ROWS compressed sparse rows a program. An entry that points outside of the matrix makes its row NaN."""
    values, indices, pointers = parts
    rows_in_all, columns, entries = sizes
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    vector, there = tl.program_id(0).to(tl.int64), row < rows_in_all
    start = tl.load(pointers + row, mask=there, other=0)
    end = tl.load(pointers + row + 1, mask=there, other=0)
    sound = (start >= 0) & (start <= end) & (end <= entries)
    end = tl.where(sound, end, start)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for passed in range(0, tl.max(end - start, axis=0), BLOCK):
        place = start[:, None] + passed + tl.arange(0, BLOCK)[None, :]
        where = place < end[:, None]
        column = tl.load(indices + place, mask=where, other=0).to(tl.int32)
        inside = (column >= 0) & (column < columns)
        some = tl.load(inputs + vector * columns + column, mask=where & inside, other=0).to(tl.float32)
        value = tl.load(values + place, mask=where, other=0).to(tl.float32)
        total += tl.where(inside, value * some, float("nan"))
    found = tl.where(sound, tl.sum(total, axis=1), float("nan"))
    tl.store(outputs + vector * rows_in_all + row, rounded(found, outputs.dtype.element_ty), mask=there)
