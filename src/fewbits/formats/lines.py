"""Codes in another order in memory, as kernels read them fastest: sixteen rows at a time, or 64 of codewords."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fewbits.core.tensor import Term
from fewbits.formats.coded import Coded, Laid
from fewbits.kernels import native
from fewbits.kernels.blocks import transpose_blocks, whole_numbers
from fewbits.kernels.layout import BASE_THREE, Description, in_lines, says_finite_levels

ROWS = 16  # that lie together
_WORD = 4  # bytes of a row's codes that lie together; of ternary ones two, where rows are not of whole words


@dataclass(frozen=True, eq=False)
class Lines(Coded):
    """A term whose codes, and what else each of its rows has for itself, lie in lines: of sixteen rows the first 32 bits of each, then
    the next 32 of each; of scales a number of each after another, of packed zero points a byte. It holds the same tensors as the term, in
    another order, computes the same, and is never written to a file: `plain` is. Made by `lay`.
    """

    term: Coded

    @property
    def shape(self) -> tuple[int, int]:
        return self.term.shape

    @classmethod
    def lay(cls, term: Coded, room: Callable[[Tensor], Tensor] = torch.empty_like) -> Lines:
        """`term`, which must fit (`may_lie_in_lines`), laid in lines, in what `room` gives for a tensor like one of its own."""

        def lay(tensor: Tensor, item: int) -> Tensor:
            return transpose_blocks(tensor, (ROWS, tensor.shape[1] * tensor.element_size() // item), item, room)

        return cls(_with(term, lay))

    def plain(self) -> Coded:
        """The term with everything by rows again."""

        def bring(tensor: Tensor, item: int) -> Tensor:
            return transpose_blocks(tensor, (tensor.shape[1] * tensor.element_size() // item, ROWS), item)

        return _with(self.term, bring)

    def described(self) -> Description | None:
        found = self.term.described()
        return None if found is None else in_lines(found)

    def define(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.plain().define(dtype)

    def taken(self, rows: Tensor) -> Term:
        def take(tensor: Tensor, item: int) -> Tensor:
            found = _by_lines(tensor, item)[rows // ROWS, :, rows % ROWS]
            return found.flatten().view(tensor.dtype).view(len(rows), tensor.shape[1])

        taken = self.term.taken(rows)  # of what lies in lines, from wrong places
        return replace(taken, **{name: take(getattr(self.term, name), item) for name, item in _laid(self.term).items()})

    def stacked(self, below: Term) -> Term | None:
        return self.plain().stacked(below.plain() if isinstance(below, Lines) else below)

    def widened(self, beside: Term) -> Term | None:
        return self.plain().widened(beside.plain() if isinstance(beside, Lines) else beside)


def may_lie_in_lines(term: Term) -> bool:
    """Whether kernels at hand compute all of the term, and read it faster in lines: rows in sixteens, of whole words and groups that end
    with lines; or what has an order of its own, such as codewords of which there are tables.
    """
    if isinstance(term, Laid):
        return term.may_lie_in_lines()
    factors = term.factors() if isinstance(term, Coded) and not isinstance(term, Lines) else None
    if factors is None or len(factors) > 1:
        return False
    found = factors[0]
    if any(tensor.device.type != "cpu" or not tensor.is_contiguous() for tensor in found.tensors):
        return False
    rows, _ = term.shape
    codes = found.tensors[0]
    fits = len(codes) == rows and rows % ROWS == 0 and codes.shape[1] % _word(found) == 0
    return fits and native.reads_lines(found.tensors, in_lines(found).layout) and says_finite_levels(found)


def lay(term: Term, room: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The tensors of a term, which must fit, that lie in another order where it lies in lines, in what `room` gives for each."""
    if isinstance(term, Laid):
        return {term.laid: getattr(term.in_lines(room), term.laid)}
    assert isinstance(term, Coded)
    laid = Lines.lay(term, room).term
    return {name: getattr(laid, name) for name in _laid(laid)}


def laid(term: Term) -> Term:
    """What a term stands for whose tensors are those that `lay` gave."""
    if isinstance(term, Laid):
        return replace(term, **{"lines": True})
    assert isinstance(term, Coded)
    return Lines(term)


def plain(term: Term) -> Term:
    """The term by rows again."""
    return term.plain() if isinstance(term, Lines) else term.in_rows() if isinstance(term, Laid) else term


def _laid(term: Coded) -> dict[str, int]:
    """Those fields, and how many bytes of a row lie together."""
    found = term.described()
    assert found is not None
    laid = {}
    for field in fields(term):
        tensor = getattr(term, field.name)
        if isinstance(tensor, Tensor) and len(tensor) == term.shape[0]:
            laid[field.name] = _word(found) if tensor is found.tensors[0] else tensor.element_size()
    return laid


def _word(matrix: Description) -> int:
    """Bytes of a row's codes that lie together, as `word_of` in csrc/matrix.h."""
    return _WORD // 2 if matrix.layout[2] == BASE_THREE and matrix.tensors[0].shape[1] % _WORD else _WORD


def _with(term: Coded, change: Callable[[Tensor, int], Tensor]) -> Coded:
    return replace(term, **{name: change(getattr(term, name), item) for name, item in _laid(term).items()})


def _by_lines(tensor: Tensor, item: int) -> Tensor:
    """`[rows / 16, items, 16]` of what lies in lines, as whole numbers of `item` bytes."""
    return whole_numbers(tensor.view(len(tensor) // ROWS, -1), item).unflatten(1, (-1, ROWS))
