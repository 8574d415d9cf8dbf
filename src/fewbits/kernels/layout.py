"""How a matrix of packed codes is described to the kernels: its tensors in order, and a list of sizes that says what they are.

value = (code - zero) * scale, levels[code] * scale, code * scale + offset, or (2 code - 1) * scale + offset; scales, zero points and
offsets lie `[rows or 1, groups]`, levels `[rows or 1, (groups or 1) * 2**bits]`. The order is that of `read_coded` in csrc/reader.h,
which checks every size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fewbits.kernels.native import number

NONE, DENSE, PACKED, CODED, TABLE, SIGNS, RUNS, MINIMUMS = range(8)
PLAIN, SPARSE, VECTORS, SIGNED, MIXED, LINES = range(1, 7)  # forms of other matrices, whose width is given as 0 bits
BASE_THREE = 9  # in the place of a width: codes of three values for -1, 0 and 1, five to a byte, the first one the lowest digit
_UNITS = (4, 8, 16)  # numbers of a codeword that kernels know


@dataclass(frozen=True, eq=False)
class Description:
    """Tensors and what they are; as part of a matrix, or a whole one."""

    tensors: tuple[Tensor, ...]
    layout: tuple[int, ...]


def dense(values: Tensor) -> Description | None:
    """Numbers `[rows, columns]`; None where kernels do not read their dtype."""
    kind = number(values.dtype)
    return None if kind is None else Description((values,), (DENSE, values.shape[0], values.shape[1], kind))


def in_runs(values: Description, ends: tuple[int, ...]) -> Description | None:
    """Numbers that each run of neighbouring rows, which end at `ends`, has for itself; None for other scales than numbers."""
    if values.layout[0] != DENSE:
        return None
    return Description(values.tensors, (RUNS, len(ends), *ends, *values.layout[2:]))


def packed(codes: Tensor, columns: int) -> Description:
    """Unsigned integers `[rows, columns]`, packed at the width of the codes of the matrix that they belong to."""
    return Description((codes,), (PACKED, codes.shape[0], columns, 0))


def table(codes: Tensor, values: Tensor) -> Description:
    """uint8 `[rows, columns]`, each the place of its value among 256 float32."""
    return Description((codes, values), (TABLE, codes.shape[0], codes.shape[1], 0))


def nested(matrix: Description) -> Description:
    """Scales, zero points or offsets that are a matrix of codes themselves."""
    return Description(matrix.tensors, (CODED, *matrix.layout))


def lasting(describe: Callable[[], Description | None]) -> Description | None:
    """What `describe` gives, where all its numbers are stored ones and none is made anew for kernels each time."""
    found, again = describe(), describe()
    if found is None or again is None or any(one is not two for one, two in zip(found.tensors, again.tensors, strict=True)):
        return None
    return found


ABSENT = Description((), (NONE,))


def offsets(counts: int, added: Description) -> Description:
    """In the place of zero points: codes count from zero (MINIMUMS), or those of one bit are -1 and 1 (SIGNS), and what is `added`, which
    may be ABSENT, is added to what they are scaled to.
    """
    return Description(added.tensors, (counts, *added.layout))


def coded(sizes: tuple[int, int, int, int], codes: Tensor, levels: Description, scales: Description, zeros: Description) -> Description:
    """A matrix of `sizes` rows, columns, bits of a code and columns of a group; `zeros` are zero points or `offsets`."""
    parts = (levels, scales, zeros)
    tensors = sum((part.tensors for part in parts), start=(codes,))
    return Description(tensors, sum((part.layout for part in parts), start=sizes))


def in_lines(matrix: Description) -> Description:
    """A matrix of codes which lie sixteen rows at a time, word after word of 32 bits: `[rows / 16, words, 16]` as int32."""
    return Description(matrix.tensors, (*matrix.layout[:2], 0, LINES, *matrix.layout[2:]))


def says_finite_levels(matrix: Description) -> bool:
    """Whether the codes of a matrix, which has no levels or the same ones for all rows, say none that is not finite.

    Of codes that are not bytes each is taken to be said.
    """
    if matrix.layout[4] == NONE:
        return True
    codes, levels = matrix.tensors[:2]
    others = [int(code) for code in (~levels.flatten().isfinite()).nonzero()]
    return not others or (matrix.layout[2] == 8 and not any(_is_among(code, codes) for code in others))


def _is_among(code: int, codes: Tensor) -> bool:
    """By what bytes differ in, a part at a time that caches hold: comparing them and asking for any takes ten times as long."""
    return any(int((part ^ code).amin()) == 0 for part in codes.flatten().split(2**20))


def plain(values: Tensor) -> Description | None:
    """A matrix of numbers as they are; None where kernels do not read their dtype."""
    kind = number(values.dtype)
    return None if kind is None else Description((values,), (*values.shape, 0, PLAIN, kind))


def sparse(values: Tensor, indices: Tensor, pointers: Tensor, columns: int) -> Description | None:
    """Compressed sparse rows: indices int16 or int32, pointers int32; None where kernels do not read the dtype of the values."""
    kind = number(values.dtype)
    sizes = (pointers.numel() - 1, columns, 0, SPARSE)
    return None if kind is None else Description((values, indices, pointers), (*sizes, kind, indices.element_size(), values.numel()))


def vectors(
    codes: Tensor, books: Tensor, scales: Tensor | None, shape: tuple[int, int], *, transposed: bool = False, lines: bool = False
) -> Description | None:
    """A matrix of `shape` whose codes stand for codewords `books [count, entries, unit]` along its rows, or down its columns where
    `transposed`; one scale for each row of codes. In `lines`, codes of 64 rows lie side by side. None where kernels do not read them.
    """
    count, entries, unit = books.shape
    width = max(1, (entries - 1).bit_length())
    kind, scaled = number(books.dtype), ABSENT if scales is None else dense(scales)
    if kind is None or scaled is None or unit not in _UNITS or width > 16:
        return None
    sizes = (*shape, 0, VECTORS, kind, unit, count, width, entries, int(transposed), int(lines))
    return Description((codes, books, *scaled.tensors), (*sizes, *scaled.layout))


def signed_product(bits: Tensor, left: Tensor, right: Tensor, *, lines: bool = False) -> Description | None:
    """The product of `left [rows, rank]` and `right [rank, columns]`, entry by entry times a sign: one stream of bits over the whole
    matrix, 1 for plus, the first the highest of its byte; in `lines`, sixteen rows at a time, word after word of 32 bits. None where
    kernels do not read the dtype of the factors.
    """
    kind = number(left.dtype)
    sizes = (left.shape[0], right.shape[1], 0, SIGNED)
    return (
        None if kind is None or left.dtype != right.dtype else Description((bits, left, right), (*sizes, kind, left.shape[1], int(lines)))
    )


def mixed_groups(
    codes: tuple[Tensor, Tensor, Tensor], columns: int, group: int, sizes: tuple[int, int, int], grid: tuple[Description, Description]
) -> Description:
    """Codes of narrow groups, of wide ones, and a bit for each group that says which; `sizes` are the two widths and how many groups of
    a row are wide, `grid` scales and zero points.
    """
    tensors = sum((part.tensors for part in grid), start=codes)
    return Description(tensors, sum((part.layout for part in grid), start=(codes[2].shape[0], columns, 0, MIXED, group, *sizes)))


def has_codes(matrix: Description) -> bool:
    """Whether a matrix is one of codes of single numbers, of one width, which can also be decoded."""
    return matrix.layout[2] != 0 or matrix.layout[3] == LINES


def has_codewords(matrix: Description) -> bool:
    """Whether a matrix is one of codewords along its rows, one for each code that there can be, which can also be decoded."""
    if matrix.layout[2:4] != (0, VECTORS):
        return False
    width, entries, transposed = matrix.layout[7:10]
    return entries == 1 << width and not transposed


def lies_in_lines(matrix: Description) -> bool:
    """Whether the codes of a matrix of codewords do."""
    return bool(matrix.layout[10])


def entries(matrix: Description) -> int:
    """How many numbers a matrix stores: those of compressed sparse rows, or all."""
    return matrix.layout[-1] if matrix.layout[2:4] == (0, SPARSE) else matrix.layout[0] * matrix.layout[1]
