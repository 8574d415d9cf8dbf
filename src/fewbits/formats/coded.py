"""What terms of packed codes share: kernels that read the codes as they are stored, and the definition in plain torch."""

from __future__ import annotations

import operator
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from fewbits.core.tensor import Term
from fewbits.kernels import dispatch, sums
from fewbits.kernels.layout import ABSENT, Description, dense, lasting, nested


class Described(Term):
    """A term that kernels can multiply as it is stored, by itself or as one of a sum."""

    @abstractmethod
    def factors(self) -> sums.Factors | None:
        """The matrix, or the two whose product it is, as kernels read them; None where none can."""

    def matmul(self, inputs: Tensor) -> Tensor:
        found = dispatch.multiply_term(self, self._one_matrix, inputs)
        return super().matmul(inputs) if found is None else found

    def _one_matrix(self) -> Description | None:
        factors = self.factors()
        return None if factors is None or len(factors) > 1 else factors[0]

    def matmul_with(self, others: tuple[Term, ...], inputs: Tensor) -> Tensor:
        found = multiply_terms((self, *others), inputs) if others else None
        return super().matmul_with(others, inputs) if found is None else found


def multiply_terms(terms: tuple[Term, ...], inputs: Tensor) -> Tensor | None:
    """`inputs [..., columns]` times the sum of `terms` in one call; None where no kernel serves."""
    rows, columns = terms[0].shape
    described = _described_sum(terms) if inputs.shape[-1] == columns and sums.may_add(inputs) else None
    found = None if described is None else sums.multiply_sums([described], [rows], inputs)
    return None if found is None else found[0]


class Laid(Described):
    """A term that says by itself how one of its tensors lies: row by row, or in an order of the same bytes that kernels read faster.

    A subclass has a field `lines`, which says whether that tensor lies so now.
    """

    laid: ClassVar[str]  # the name of that tensor

    @abstractmethod
    def may_lie_in_lines(self) -> bool:
        """Whether kernels at hand read that tensor faster in lines."""

    @abstractmethod
    def in_lines(self, room: Callable[[Tensor], Tensor] = torch.empty_like) -> Self:
        """The same matrix in lines, where that is an order of it; written into what `room` gives for a tensor like the one that moves."""

    @abstractmethod
    def in_rows(self) -> Self:
        """The same matrix row by row."""


_KEPT: weakref.WeakKeyDictionary[Term, tuple[tuple[Term, ...], Description | None]] = weakref.WeakKeyDictionary()


def _described_sum(terms: tuple[Term, ...]) -> Description | None:
    """How kernels are told of a sum, kept beside its first term as long as that lives: terms never change.

    A sum of which a number is made anew for kernels is described anew each time; that it is such a one is kept.
    """
    if torch.compiler.is_compiling():
        return sums.describe_sum(describe_terms(terms))
    kept = _KEPT.get(terms[0])
    if kept is not None and len(kept[0]) + 1 == len(terms) and all(map(operator.is_, kept[0], terms[1:])):
        return kept[1] or sums.describe_sum(describe_terms(terms))
    found = describe_lasting(terms)
    if not any(one is terms[0] for one in terms[1:]):
        _KEPT[terms[0]] = terms[1:], found
    return found or sums.describe_sum(describe_terms(terms))


def describe_lasting(terms: tuple[Term, ...], biases: Sequence[Tensor] = ()) -> Description | None:
    """The sum of `terms` and `biases [rows]` as kernels read it, where all its numbers are stored ones and none is made for kernels."""
    return lasting(lambda: sums.describe_sum(describe_terms(terms), biases))


def describe_terms(terms: tuple[Term, ...]) -> list[sums.Factors] | None:
    """All terms as kernels read them; None where they cannot read one."""
    found = [term.factors() if isinstance(term, Described) else None for term in terms]
    there = [factors for factors in found if factors is not None]
    return there if len(there) == len(found) else None


class Coded(Described):
    """A term whose values kernels can compute from its codes. The definition is `define`; kernels agree with it."""

    @abstractmethod
    def define(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense matrix [rows, columns] in plain torch: what every kernel is compared with."""

    @abstractmethod
    def described(self) -> Description | None:
        """The term as kernels read it; None where none can."""

    def factors(self) -> sums.Factors | None:
        found = self.described()
        return None if found is None else (found,)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        found = dispatch.decode(self.described(), dtype)
        return self.define(dtype) if found is None else found

    def matmul(self, inputs: Tensor) -> Tensor:
        found = dispatch.multiply_term(self, self.described, inputs)
        return inputs @ self.define(inputs.dtype).T if found is None else found


def describe_numbers(stored: Tensor | Term | None) -> Description | None:
    """Scales, zero points or levels that are numbers, a term of codes, or another term, which is decoded here.

    None where kernels do not read them.
    """
    if stored is None:
        return ABSENT
    if isinstance(stored, Coded):
        inner = stored.described()
        return None if inner is None else nested(inner)
    return dense(stored.decode() if isinstance(stored, Term) else stored)


def taken_rows(stored: Tensor | Term, rows: Tensor) -> Tensor | Term:
    """Of numbers that each row has for itself those of `rows [count]`; one row that all share stays."""
    if stored.shape[0] == 1:
        return stored
    return stored.index_select(0, rows) if isinstance(stored, Tensor) else stored.taken(rows)


def stored_numbers(stored: Tensor | Term) -> Tensor:
    """Scales, zero points or minimums in float32, which are numbers or a term of them."""
    return stored.decode() if isinstance(stored, Term) else stored.float()


def spread_groups(values: Tensor, group_size: int, columns: int) -> Tensor:
    """One value a group `[rows, groups]` to one a column `[rows, columns]`; a single group stays `[rows, 1]` and broadcasts."""
    return values if values.shape[1] == 1 else values.repeat_interleave(group_size, dim=1)[:, :columns]
