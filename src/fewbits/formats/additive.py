"""Vectors of neighbouring weights as sums of codewords: value = scale * (C_1[b_1] + ... + C_M[b_M]).

Source: additive quantization (Babenko and Lempitsky, 2014), in the form of AQLM (arXiv 2401.06118, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.formats.coded import Laid
from fewbits.formats.packing import pack, unpack
from fewbits.kernels import dispatch, native
from fewbits.kernels.blocks import transpose_blocks
from fewbits.kernels.layout import vectors
from fewbits.kernels.sums import Factors

_LINE_ROWS, _LINE_BITS = 64, 8  # of codes that share a line
_FEWEST_ROWS = 256  # for which making tables is less than what they save


@dataclass(frozen=True, eq=False)
class Additive(Laid, kind="additive"):
    """Packed codes `[rows, bytes]`, `codebooks [books, entries, unit]`, and `scales [rows, 1]` or None.

    Each group of `unit` neighbouring columns of a row has one code for each codebook. Where the columns end inside the last
    group, its values beyond them mean nothing. One codebook is plain vector quantization. Made by `from_codes`.

    Where they are `lines`, codes of a byte lie in another order of the same bytes: of every 64 rows the first codes side by side,
    then the second ones; rows that are left lie behind, one after another. So kernels read them that look codes of 64 rows up at once.
    """

    laid: ClassVar[str] = "codes"

    codes: Tensor
    codebooks: Tensor
    scales: Tensor | None
    rows: int
    columns: int
    lines: bool = False

    def __post_init__(self) -> None:
        bits = index_bits(self.codebooks.shape[1])
        if self.lines and bits != _LINE_BITS:
            raise InputError(f"codes of {bits} bits cannot lie in lines; codes of {_LINE_BITS} can")

    @classmethod
    def from_codes(cls, codes: Tensor, codebooks: Tensor, scales: Tensor | None = None, *, columns: int | None = None) -> Additive:
        """`codes [rows, groups, books]`, integers; codebooks and scales are stored in the dtype they come in.

        `columns` is groups * unit, or less by a part of the last group. Raises InputError where shapes disagree, a number is
        not finite, or a code does not fit.
        """
        rows, groups, books = codes.shape
        count, entries, unit = codebooks.shape
        columns = groups * unit if columns is None else columns
        if count != books or not (groups - 1) * unit < columns <= groups * unit:
            raise InputError(f"codes {list(codes.shape)} and codebooks {list(codebooks.shape)} do not fit {columns} columns")
        if scales is not None and scales.shape != (rows, 1):
            raise InputError(f"scales {list(scales.shape)} do not fit; [{rows}, 1] would")
        if codes.numel() and int(codes.max()) >= entries:
            raise InputError(f"a code of {int(codes.max())} does not fit codebooks of {entries} entries")
        for name, values in (("codebook entry", codebooks), ("scale", scales)):
            if values is not None and not bool(torch.isfinite(values).all()):
                raise InputError(f"a {name} is not finite in {values.dtype}; a wider dtype, or finite weights, would be right")
        return cls(pack(codes.reshape(rows, -1), index_bits(entries)), codebooks, scales, rows, columns)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def unpacked_codes(self) -> Tensor:
        """int64 `[rows, groups, books]`."""
        books, entries, unit = self.codebooks.shape
        groups = -(-self.columns // unit)
        codes = _out_of_lines(self.codes) if self.lines else self.codes
        return unpack(codes, index_bits(entries), groups * books).view(self.rows, groups, books).long()

    def may_lie_in_lines(self) -> bool:
        """Whether kernels at hand read the codes faster in lines."""
        found = vectors(self.codes, self.codebooks, self.scales, self.shape, lines=True)
        if self.lines or index_bits(self.codebooks.shape[1]) != _LINE_BITS or self.rows < _FEWEST_ROWS or found is None:
            return False
        there = all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in found.tensors)
        return there and native.reads_lines(found.tensors, found.layout)

    def in_lines(self, room: Callable[[Tensor], Tensor] = torch.empty_like) -> Additive:
        """The same matrix with its codes in lines, where that is an order: for codes of a byte and 64 rows or more.

        They are written into what `room` gives for a tensor like them.
        """
        if self.lines or index_bits(self.codebooks.shape[1]) != _LINE_BITS or self.rows < _LINE_ROWS:
            return self
        return replace(self, codes=_exchanged(self.codes, (_LINE_ROWS, self.codes.shape[1]), room), lines=True)

    def in_rows(self) -> Additive:
        """The same matrix with its codes row after row."""
        return replace(self, codes=_out_of_lines(self.codes), lines=False) if self.lines else self

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        values = decode_additive(self.unpacked_codes(), self.codebooks.float(), self.columns)
        return (values if self.scales is None else values * self.scales.float()).to(dtype)

    def factors(self) -> Factors | None:
        found = vectors(self.codes, self.codebooks, self.scales, (self.rows, self.columns), lines=self.lines)
        return None if found is None else (found,)

    def matmul_transposed(self, inputs: Tensor) -> Tensor:
        """`inputs [..., rows] @ decode()`."""
        described = vectors(self.codes, self.codebooks, self.scales, (self.columns, self.rows), transposed=True, lines=self.lines)
        found = dispatch.multiply(described, inputs)
        return super().matmul_transposed(inputs) if found is None else found


def _out_of_lines(codes: Tensor) -> Tensor:
    return _exchanged(codes, (codes.shape[1], _LINE_ROWS), torch.empty_like)


def _exchanged(codes: Tensor, sizes: tuple[int, int], room: Callable[[Tensor], Tensor]) -> Tensor:
    """Bytes `[rows, bytes]` of which every whole block of 64 rows, read as a matrix of `sizes`, lies the other way round."""
    whole, found = len(codes) // _LINE_ROWS * _LINE_ROWS, room(codes)
    transpose_blocks(codes[:whole], sizes, 1, lambda _: found[:whole])
    found[whole:].copy_(codes[whole:])
    return found


def index_bits(entries: int) -> int:
    """Bits of a code for `entries` codewords."""
    return max(1, math.ceil(math.log2(entries)))


def decode_additive(codes: Tensor, codebooks: Tensor, columns: int) -> Tensor:
    """`codes [rows, groups, books]`, `codebooks [books, entries, unit]` to the unscaled matrix `[rows, columns]`; differentiable."""
    total = codebooks[0][codes[:, :, 0]]
    for book in range(1, codebooks.shape[0]):
        total = total + codebooks[book][codes[:, :, book]]
    return total.flatten(1)[:, :columns]
