"""How a matrix of packed codes is described to the kernels: its tensors in order, and a list of sizes that says what they are.

value = (code - zero) * scale, or levels[code] * scale; scales and zero points lie `[rows or 1, groups]`, levels
`[rows or 1, (groups or 1) * 2**bits]`. The order is that of `read_coded` in csrc/bindings.cpp, which checks every size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewbits.kernels.native import number

_NONE, _DENSE, _PACKED, _CODED, _TABLE = range(5)
_PLAIN, _SPARSE = 1, 2  # forms of matrices without codes, whose width is given as 0 bits


@dataclass(frozen=True, eq=False)
class Description:
    """Tensors and what they are; as part of a matrix, or a whole one."""

    tensors: tuple[Tensor, ...]
    layout: tuple[int, ...]


def dense(values: Tensor) -> Description | None:
    """Numbers `[rows, columns]`; None where kernels do not read their dtype."""
    kind = number(values.dtype)
    return None if kind is None else Description((values,), (_DENSE, values.shape[0], values.shape[1], kind))


def packed(codes: Tensor, columns: int) -> Description:
    """Unsigned integers `[rows, columns]`, packed at the width of the codes of the matrix that they belong to."""
    return Description((codes,), (_PACKED, codes.shape[0], columns, 0))


def table(codes: Tensor, values: Tensor) -> Description:
    """uint8 `[rows, columns]`, each the place of its value among 256 float32."""
    return Description((codes, values), (_TABLE, codes.shape[0], codes.shape[1], 0))


def nested(matrix: Description) -> Description:
    """Scales or zero points that are a matrix of codes themselves."""
    return Description(matrix.tensors, (_CODED, *matrix.layout))


ABSENT = Description((), (_NONE,))


def coded(sizes: tuple[int, int, int, int], codes: Tensor, levels: Description, scales: Description, zeros: Description) -> Description:
    """A matrix of `sizes` rows, columns, bits of a code and columns of a group."""
    parts = (levels, scales, zeros)
    tensors = sum((part.tensors for part in parts), start=(codes,))
    return Description(tensors, sum((part.layout for part in parts), start=sizes))


def plain(values: Tensor) -> Description | None:
    """A matrix of numbers as they are; None where kernels do not read their dtype."""
    kind = number(values.dtype)
    return None if kind is None else Description((values,), (*values.shape, 0, _PLAIN, kind))


def sparse(values: Tensor, indices: Tensor, pointers: Tensor, columns: int) -> Description | None:
    """Compressed sparse rows: indices int16 or int32, pointers int32; None where kernels do not read the dtype of the values."""
    kind = number(values.dtype)
    sizes = (pointers.numel() - 1, columns, 0, _SPARSE)
    return None if kind is None else Description((values, indices, pointers), (*sizes, kind, indices.element_size(), values.numel()))


def has_codes(matrix: Description) -> bool:
    """Whether a matrix is one of codes, which can also be decoded."""
    return matrix.layout[2] != 0
