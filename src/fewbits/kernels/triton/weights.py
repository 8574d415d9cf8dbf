"""Tiles of a matrix as numbers, made from packed codes where they lie: what every kernel of this folder reads weights with.

A tile has `rows`, int64 `[tile rows]`, and `BLOCK` columns from `first` on, a multiple of BLOCK; what lies outside of the matrix is read
as zero bytes and never followed. `parts` are pointers to codes, levels, scales and zero points or offsets, `strides` elements from a row of
each to the next, 0 where all rows share one.
"""

import triton
import triton.language as tl

from fewbits.kernels import layout
from fewbits.kernels.triton import structure

_BASE_THREE = tl.constexpr(layout.BASE_THREE)
_MIDDLE, _ZEROS, _PACKED_ZEROS = tl.constexpr(structure.MIDDLE), tl.constexpr(structure.ZEROS), tl.constexpr(structure.PACKED_ZEROS)
_SIGNS, _SIGNS_AND_OFFSETS = tl.constexpr(structure.SIGNS), tl.constexpr(structure.SIGNS_AND_OFFSETS)
_FROM_ZERO, _FROM_MINIMUMS = tl.constexpr(structure.FROM_ZERO), tl.constexpr(structure.FROM_MINIMUMS)
_ONE_BOOK, _BOOK_A_GROUP = tl.constexpr(structure.ONE_BOOK), tl.constexpr(structure.BOOK_A_GROUP)
_NUMBERS = tl.constexpr(structure.NUMBERS)


@triton.jit
def read_codes(codes, stride, rows, there, first, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """int32 `[tile rows, BLOCK]`. Bytes and codes meet again after COUNT codes, such as 8 of 3 bits: each such run is one number."""
    COUNT: tl.constexpr = 8 if BITS % 2 == 1 else 4 if BITS % 4 == 2 else 2 if BITS == 4 else 1
    TAKEN: tl.constexpr = BITS * COUNT // 8
    WORD: tl.constexpr = tl.int32 if TAKEN <= 3 else tl.int64
    start = codes + rows[:, None] * stride
    place = first // COUNT * TAKEN + tl.arange(0, BLOCK // COUNT) * TAKEN
    word = tl.load(start + place[None, :], mask=there[:, None] & (place < stride)[None, :], other=0).to(WORD)
    for byte in tl.static_range(1, TAKEN):
        more = tl.load(start + (place + byte)[None, :], mask=there[:, None] & (place + byte < stride)[None, :], other=0)
        word = word | (more.to(WORD) << (8 * byte))
    fields = (word[:, :, None] >> (tl.arange(0, COUNT) * BITS)[None, None, :].to(WORD)) & (2**BITS - 1)
    return tl.reshape(fields, (rows.shape[0], BLOCK)).to(tl.int32)


@triton.jit
def read_digits(codes, stride, rows, there, first, BLOCK: tl.constexpr):
    """int32 `[tile rows, BLOCK]` of codes to the base of three, five to a byte, the first the lowest digit."""
    columns = first + tl.arange(0, BLOCK)
    place, digit = columns // 5, columns % 5
    five = tl.load(codes + rows[:, None] * stride + place[None, :], mask=there[:, None] & (place < stride)[None, :], other=0).to(tl.int32)
    power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
    return five // power[None, :] % 3


@triton.jit
def groups_of(first, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """int32: the groups of a tile's columns, one for all, one for each run of GROUP, or one for each column. GROUP 0 is whole rows."""
    if GROUP == 0:
        return tl.zeros((1,), dtype=tl.int32)
    elif GROUP % BLOCK == 0:
        return first // GROUP + tl.zeros((1,), dtype=tl.int32)
    elif BLOCK % GROUP == 0:
        return first // GROUP + tl.arange(0, BLOCK // GROUP)
    else:
        return (first + tl.arange(0, BLOCK)) // GROUP


@triton.jit
def spread(values, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """`[tile rows, groups]` as `groups_of` has them to what broadcasts to `[tile rows, BLOCK]`."""
    if values.shape[1] == 1 or values.shape[1] == BLOCK:
        return values
    else:
        wide = tl.broadcast_to(values[:, :, None], (values.shape[0], values.shape[1], GROUP))
        return tl.reshape(wide, (values.shape[0], BLOCK))


@triton.jit
def read_numbers(values, stride, rows, there, groups, count):
    """float32 `[tile rows, groups]` of a table of `count` columns; zero outside of it."""
    where = there[:, None] & (groups < count)[None, :]
    return tl.load(values + rows[:, None] * stride + groups[None, :], mask=where, other=0).to(tl.float32)


@triton.jit
def read_packed(values, stride, width, rows, there, groups, BITS: tl.constexpr):
    """float32 `[tile rows, groups]` of a table of packed integers, whose rows have `width` bytes."""
    bit = groups * BITS
    start = values + rows[:, None] * stride + (bit // 8)[None, :]
    low = tl.load(start, mask=there[:, None] & (bit // 8 < width)[None, :], other=0).to(tl.int32)
    high = tl.load(start + 1, mask=there[:, None] & (bit // 8 + 1 < width)[None, :], other=0).to(tl.int32)
    return (((low | (high << 8)) >> (bit % 8)[None, :]) & (2**BITS - 1)).to(tl.float32)


@triton.jit
def read_levels(levels, stride, codes, rows, there, groups, count, GROUP: tl.constexpr, GRID: tl.constexpr, BOOK: tl.constexpr):  # noqa: PLR0913
    """float32 in the shape of the codes: each one's number in its row's book, or its row's and group's."""
    place = levels + rows[:, None] * stride + codes
    if GRID == _BOOK_A_GROUP:
        inside = spread((groups < count)[None, :].to(tl.int32), GROUP, codes.shape[1]) != 0
        place = place + spread(groups[None, :], GROUP, codes.shape[1]) * BOOK
        found = tl.load(place, mask=there[:, None] & inside, other=0)
    else:
        found = tl.load(place, mask=there[:, None], other=0)
    return found.to(tl.float32)


@triton.jit
def read_weights(  # noqa: PLR0913 - a tile of a matrix, and all that its form is made of
    parts,
    strides,
    rows,
    there,
    first,
    columns,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GRID: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """float32 `[tile rows, BLOCK]`: the very numbers that the definition has, but for the last place where minimums are added to multiples
    of float32 scales in one instruction: those of scales of 16 bits are exact. What lies outside of the matrix means nothing.
    """
    if GRID == _NUMBERS:
        numbers = read_numbers(parts[0], strides[0], rows, there, first + tl.arange(0, BLOCK), columns)
    else:
        groups = groups_of(first, GROUP, BLOCK)
        count = 1 if GROUP == 0 else (columns + GROUP - 1) // GROUP
        if BITS == _BASE_THREE:
            codes = read_digits(parts[0], strides[0], rows, there, first, BLOCK)
        else:
            codes = read_codes(parts[0], strides[0], rows, there, first, BITS, BLOCK)
        if SCALED:
            scales = spread(read_numbers(parts[2], strides[2], rows, there, groups, count), GROUP, BLOCK)
        else:
            scales = tl.full((1, 1), 1.0, dtype=tl.float32)
        if GRID >= _ONE_BOOK:  # a book for all, or one a group
            numbers = read_levels(parts[1], strides[1], codes, rows, there, groups, count, GROUP, GRID, 2**BITS) * scales
        elif GRID >= _FROM_ZERO:
            numbers = tl.where(codes != 0, scales, -scales) if GRID >= _SIGNS else codes.to(tl.float32) * scales
            if (GRID == _FROM_MINIMUMS) | (GRID == _SIGNS_AND_OFFSETS):
                numbers += spread(read_numbers(parts[3], strides[3], rows, there, groups, count), GROUP, BLOCK)
        elif GRID == _MIDDLE:
            middle: tl.constexpr = 1 if BITS == _BASE_THREE else 2 ** (BITS - 1)
            numbers = (codes - middle).to(tl.float32) * scales
        else:
            if GRID == _ZEROS:
                zeros = read_numbers(parts[3], strides[3], rows, there, groups, count)
            else:
                zeros = read_packed(parts[3], strides[3], (count * BITS + 7) // 8, rows, there, groups, BITS)
            numbers = (codes.to(tl.float32) - spread(zeros, GROUP, BLOCK)) * scales
    return numbers


# Triton's interpreter cuts numbers off where it makes them bfloat16, and does not multiply those: there, both is done by hand.
_INTERPRETED = tl.constexpr(not isinstance(read_codes, triton.JITFunction))


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 `values` in `dtype`, the nearest, of two the even one."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        found = tl.where(values == values, upper, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        found = values.to(dtype)
    return found


@triton.jit
def product(left, right, total):
    """`total [m, n] + left [m, k] @ right [k, n]`, summed in float32; numbers of 16 bits are taken as they are."""
    if _INTERPRETED and left.dtype == tl.bfloat16:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(left, right, total, input_precision="ieee")
    return total
