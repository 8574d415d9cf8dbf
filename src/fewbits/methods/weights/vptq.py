"""VPTQ: vectors along the outputs, one column at a time, with each column's error fed into the columns after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewbits.core.checks import check_positive, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import BlockMethod, Paper, Statistics, Tuning
from fewbits.core.published import LLAMA2_AT_4K, Figure, Published
from fewbits.core.tensor import CompressedTensor, Term, Transform
from fewbits.formats.additive import Additive, decode_additive
from fewbits.formats.columns import Columns
from fewbits.formats.permutation import Permutation
from fewbits.formats.scaled import ColumnScaled
from fewbits.formats.total import ColumnOffsets, Total
from fewbits.formats.transposed import Transposed
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.linear import StoredLinear
from fewbits.layers.straight_through import straight_through
from fewbits.solvers.error_feedback import Factor, error_feedback, factorize
from fewbits.solvers.vector_kmeans import cluster_vectors, nearest
from fewbits.statistics.hessian import Hessian

_VECTORS_AN_ENTRY = 8  # a codebook has no more entries than a share of the vectors that it is for


@dataclass(frozen=True)
class Vptq(BlockMethod):
    """Every column of a weight is cut into vectors of `vector` neighbouring outputs, each the nearest of `entries` centroids.

    Centroids come from k-means weighted by the Hessian's diagonal; a column's error goes into later columns as in GPTQ, of
    which columns with large inputs come first. `residual_entries` adds a second codebook, fitted to what the first leaves
    after feedback; `outlier_share` gives the first columns a codebook of their own, `column_groups` cuts the others into
    ranges with one each. Afterwards a block's centroids and norms are trained with all indices fixed (`steps`), and all
    centroids of the model on text (`tune_steps`). Stored: indices, fp16 codebooks, a permutation where there are ranges, an
    fp16 scale and offset a column where they are normalized. A codebook has at most an eighth as many entries as vectors.
    Departures: see the page. Raises InputError for values out of range.
    """

    vector: int = 4
    entries: int = 256
    residual_entries: int = 0
    outlier_share: float = 0.0
    outlier_vector: int = 4
    outlier_entries: int = 256
    column_groups: int = 1
    normalize: Literal["none", "rescaled", "official"] = "none"
    without: Literal["nothing", "weights", "order"] = "nothing"  # for comparison: plain k-means, or columns as they come
    damping: float = 0.01
    steps: int = 100
    rate: float = 3e-4
    norm_rate: float = 3e-4
    tune_steps: int = 0
    batch_size: int = 4
    seed: int = 0

    paper: ClassVar[Paper] = Paper("VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models", "2409.17066", 2024)
    published: ClassVar = Published(
        own=Figure("VPTQ", 6.13, 2.02, "vptq"),
        rivals=(
            Figure("QuIP#", 6.19, 2),
            Figure("AQLM", 6.64, 2.02, "aqlm"),
            Figure("GPTQ, 2 bits", 50.75, 2.125, "gptq:bits=2,group_size=128"),
        ),
        **LLAMA2_AT_4K,
        setting="codebooks of 256 vectors of 4, where the paper's of 65536 vectors of 8 would outweigh a small model",
    )
    baseline: ClassVar[str | None] = "gptq"
    needs: ClassVar = (Hessian,)

    def __post_init__(self) -> None:
        for name in ("vector", "outlier_vector"):
            check_range(name, getattr(self, name), 1, 64)
        check_range("entries", self.entries, 2, 2**16)
        check_range("residual_entries", self.residual_entries, 0, 2**16)
        check_range("outlier_share", self.outlier_share, 0, 0.5)
        check_range("outlier_entries", self.outlier_entries, 2, 2**16)
        check_range("column_groups", self.column_groups, 1, 10**4)
        for name in ("damping", "rate"):
            check_positive(name, getattr(self, name), getattr(Vptq, name))
        for name in ("steps", "tune_steps"):
            check_range(name, getattr(self, name), 0, 10**7)
        for name, known in {"normalize": ("none", "rescaled", "official"), "without": ("nothing", "weights", "order")}.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is not known; {', '.join(map(repr, known))} are")

    def begin(self, weight: Tensor, bias: Tensor | None, statistics: Statistics) -> nn.Module:
        return self.begin_group({"weight": weight}, {"weight": bias}, statistics)["weight"]

    def begin_group(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor | None], statistics: Statistics
    ) -> dict[str, nn.Module]:
        hessian = statistics[Hessian].matrix
        return {name: _Vectors(self, weight, self.solve(weight, hessian), biases[name]) for name, weight in weights.items()}

    def tuning(self) -> Tuning | None:
        if not self.tune_steps:
            return None
        return Tuning(self.tune_steps, self.rate, ("codebooks",), self.batch_size, clip=1.0, seed=self.seed)

    def solve(self, weight: Tensor, hessian: Tensor) -> _Solution:
        """Codebooks and codes of each range of columns, the columns' order, and scale and offset of each where normalized."""
        affine = None
        if self.normalize != "none":
            affine = _affine(weight)
            scale, offset = (one.float() for one in affine)
            weight = (weight - offset) / scale
            if self.normalize == "rescaled":  # an error e of the normalized weight is an error e s of the weight
                hessian = scale[:, None] * hessian * scale
        order = torch.arange(weight.shape[1])
        if self.without != "order":
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        hessian, weight = hessian[order][:, order], weight[:, order]
        factor = factorize(hessian, self.damping)
        weight = torch.where(factor.dead, 0.0, weight)  # inputs that are always zero need no weight
        strength = hessian.diagonal().float() if self.without != "weights" else torch.ones(weight.shape[1])
        ranges = [_Range.fitted(self, weight, strength, *sizes) for sizes in self._ranges(weight.shape[1])]
        errors = self._feedback(weight, factor, ranges)
        if self.residual_entries:
            for one in ranges:
                one.add_book(self, errors, strength)
            self._feedback(weight, factor, ranges)
        return ranges, order, affine

    def _ranges(self, columns: int) -> list[tuple[range, int, int]]:
        """Runs of columns with one codebook each, its vectors' length and its entries; what the division leaves joins the outliers."""
        outliers = round(self.outlier_share * columns)
        groups = min(self.column_groups, columns - outliers)
        if outliers:
            outliers += (columns - outliers) % groups
        size = -(-(columns - outliers) // groups)
        starts = range(outliers, columns, size)
        found = [(range(start, min(start + size, columns)), self.vector, self.entries) for start in starts]
        return [(range(outliers), self.outlier_vector, self.outlier_entries), *found] if outliers else found

    def _feedback(self, weight: Tensor, factor: Factor, ranges: list[_Range]) -> Tensor:
        """Codes of all columns in turn; what each column, as feedback had moved it, differs from its vectors, `[rows, columns]`."""
        left = torch.empty_like(weight)
        at = {column: one for one in ranges for column in one.columns}

        def quantize(j: int, column: Tensor, _: Tensor) -> Tensor:
            found = at[j].encode(j, column)
            left[:, j] = column - found
            return found

        error_feedback(weight, factor, quantize)
        return left


_Solution = tuple[list["_Range"], Tensor, tuple[Tensor, Tensor] | None]


def _affine(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp16 scale and offset of each column: its range, and where it starts."""
    low, high = weight.amin(0), weight.amax(0)
    scale = (high - low).clamp(min=1e-4).half()  # a column of equal weights would have none
    return scale, low.half()


class _Range:
    """Neighbouring columns with codebooks of their own."""

    def __init__(self, columns: range, vector: int, codes: Tensor) -> None:
        self.columns, self.vector, self.codes = columns, vector, codes  # codes [columns, vectors, books]
        self.codebooks: list[Tensor] = []

    @classmethod
    def fitted(cls, method: Vptq, weight: Tensor, strength: Tensor, columns: range, vector: int, entries: int) -> _Range:
        made = cls(columns, vector, torch.zeros(len(columns), -(-weight.shape[0] // vector), 0, dtype=torch.int64))
        made._fit(method, weight, strength, entries)
        return made

    def add_book(self, method: Vptq, errors: Tensor, strength: Tensor) -> None:
        """A second codebook, for what the first leaves of the weight."""
        self._fit(method, errors, strength, method.residual_entries)

    def _fit(self, method: Vptq, values: Tensor, strength: Tensor, entries: int) -> None:
        part = values[:, self.columns.start : self.columns.stop].T
        vectors = _cut(part, self.vector)
        weights = strength[self.columns.start : self.columns.stop, None].expand(vectors.shape[:2]).flatten()
        most = max(2, 2 ** ((weights.numel() // _VECTORS_AN_ENTRY).bit_length() - 1))
        centroids, _ = cluster_vectors(vectors.flatten(0, 1), min(entries, most), weights=weights, seed=method.seed)
        self.codebooks.append(centroids.half().float())
        self.codes = torch.zeros(*self.codes.shape[:2], len(self.codebooks), dtype=torch.int64)

    def encode(self, j: int, column: Tensor) -> Tensor:
        """The column's nearest vectors; their codes are kept."""
        left = _cut(column[None], self.vector)[0]
        found = torch.zeros_like(left)
        for book, centroids in enumerate(self.codebooks):
            codes = nearest(left - found, centroids)[0]
            self.codes[j - self.columns.start, :, book] = codes
            found = found + centroids[codes]
        return found.flatten()[: len(column)]


def _cut(rows: Tensor, size: int) -> Tensor:
    """`[rows, length]` to vectors `[rows, vectors, size]`, the last one filled with zeros."""
    return nn.functional.pad(rows, (0, -rows.shape[1] % size)).unflatten(1, (-1, size))


class _Vectors(LearnedLinear):
    """Fixed indices; the centroids are trained."""

    def __init__(self, method: Vptq, weight: Tensor, solution: _Solution, bias: Tensor | None) -> None:
        super().__init__(bias)
        ranges, order, affine = solution
        self.rate, self.rows, self.ranges = method.rate, weight.shape[0], len(ranges)
        self.books = nn.ParameterList([nn.Parameter(book) for one in ranges for book in one.codebooks])
        self.each = len(ranges[0].codebooks)
        for number, one in enumerate(ranges):
            self.register_buffer(f"codes{number}", one.codes)
        self.register_buffer("order", order)
        self.register_buffer("affine", None if affine is None else torch.stack(affine))

    def weight(self) -> Tensor:
        columns = torch.cat([self._decoded(number) for number in range(self.ranges)])
        weight = columns.T[:, torch.argsort(self.get_buffer("order"))]
        affine = self._affine()
        return weight if affine is None else weight * affine[0].float() + affine[1].float()

    def _affine(self) -> tuple[Tensor, Tensor] | None:
        """Scale and offset of each column, where they were normalized."""
        stored = dict(self.named_buffers()).get("affine")
        return None if stored is None else (stored[0], stored[1])

    def _decoded(self, number: int) -> Tensor:
        """The columns of a range `[columns, rows]`, in the order of the visit."""
        codes, total = self.get_buffer(f"codes{number}"), torch.zeros(())
        for book in range(self.each):
            values = self.books[number * self.each + book]
            rounded = straight_through(values, values.detach().half().float())
            total = total + decode_additive(codes[:, :, book : book + 1], rounded[None], self.rows)
        return total

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.books), "lr": self.rate}]

    def finish(self) -> StoredLinear:
        order, transforms = self.get_buffer("order"), tuple[Transform, ...]()
        if self.ranges == 1:  # one codebook for all: the columns need no other order
            inner = self._term(0, torch.argsort(order))
        else:
            parts = tuple(self._term(number, torch.arange(len(self.get_buffer(f"codes{number}")))) for number in range(self.ranges))
            inner, transforms = Columns(parts), (Permutation.from_order(order),)
        affine = self._affine()
        if affine is None:
            return StoredLinear(CompressedTensor((inner,), transforms))
        scale, offset = (one[order] if transforms else one for one in affine)
        terms = (ColumnScaled(inner, scale), ColumnOffsets(offset, self.rows))
        return StoredLinear(CompressedTensor(terms, transforms))

    def _term(self, number: int, order: Tensor) -> Term:
        """The columns of a range, in an `order`."""
        codes = self.get_buffer(f"codes{number}")[order]
        books = [self.books[number * self.each + book].detach().half() for book in range(self.each)]
        terms = [Additive.from_codes(codes[:, :, i : i + 1], book[None], columns=self.rows) for i, book in enumerate(books)]
        parts = tuple(Transposed(term) for term in terms)
        return parts[0] if len(parts) == 1 else Total(parts)
