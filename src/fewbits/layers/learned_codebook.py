"""Codebooks of runs of rows in training, together with which codeword each weight takes.

Source: Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings (arXiv 2309.17361).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.codebook import Codebook
from fewbits.formats.permutation import PackedPermutation
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.linear import StoredLinear
from fewbits.layers.straight_through import straight_through
from fewbits.solvers.kmeans import nearest_level
from fewbits.solvers.row_groups import RowGroups


def mean_gap(books: Tensor) -> Tensor:
    """Mean distance of neighbouring codewords of each of `books [rows, count]`, `[rows, 1]`; never quite zero."""
    return ((books.amax(1) - books.amin(1)) / max(books.shape[1] - 1, 1)).clamp(min=1e-12)[:, None]


def pull(distance: Tensor, gap: Tensor, proximal: bool) -> Tensor:
    """How strongly a codeword at `distance` from the one in use asks for a weight.

    The usual relaxation gives the distance itself, which favours far codewords. The proximal pull gap**2 / distance falls
    with it instead, equals it at one mean gap, and is zero at zero.
    """
    if not proximal:
        return distance
    return torch.where(distance > 0, gap.square() / distance.clamp(min=1e-20), 0.0)


class _Logits(torch.autograd.Function):
    """The codeword of the largest of `logits [rows, columns, count]`, of each row's own `books [rows, count]`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, books: Tensor, proximal: bool) -> Tensor:
        codes = logits.argmax(-1)
        ctx.save_for_backward(logits, books, codes)
        ctx.proximal = proximal
        return books.gather(1, codes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        logits, books, codes = ctx.saved_tensors
        away = books[:, None] - books.gather(1, codes)[..., None]
        strength = away.sign() * pull(away.abs(), mean_gap(books)[..., None], ctx.proximal)
        moved = gradients[0][..., None] * torch.softmax(logits, dim=-1) * strength
        return moved, torch.zeros_like(books).scatter_add_(1, codes, gradients[0]), None


class _Nearest(torch.autograd.Function):
    """The codeword nearest to each of `places [rows, columns]`, of each row's own ascending `books [rows, count]`.

    As if there were logits -|place - codeword| / (gap / 2) of the two codewords around the place (at an end: the last two).
    """

    @staticmethod
    def forward(ctx: Any, places: Tensor, books: Tensor, proximal: bool) -> Tensor:
        codes = nearest_level(places, books).long()
        ctx.save_for_backward(places, books, codes)
        ctx.proximal = proximal
        return books.gather(1, codes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        places, books, codes = ctx.saved_tensors
        last, gap = books.shape[1] - 1, mean_gap(books)
        chosen = books.gather(1, codes)
        other = codes + torch.where(places > chosen, 1, -1)
        other = torch.where(other < 0, 1, torch.where(other > last, last - 1, other))
        rival = books.gather(1, other)
        share = torch.sigmoid(((places - chosen).abs() - (places - rival).abs()) / (gap / 2))
        # The rival's logit grows as the place comes nearer to it, which is the direction in which the value would change.
        moved = gradients[0] * share * pull((rival - chosen).abs(), gap, ctx.proximal) / (gap / 2)
        return moved, torch.zeros_like(books).scatter_add_(1, codes, gradients[0]), None


def by_logits(logits: Tensor, books: Tensor, proximal: bool = True) -> Tensor:
    """Hard codewords `[rows, columns]`; a codeword's gradient is the sum over the weights that take it.

    That of logit c is g p_c sign(d_c) pull(|d_c|): p the softmax, d_c from the codeword in use to codeword c.
    """
    return _Logits.apply(logits, books, proximal)  # type: ignore[no-any-return]


def by_nearest(places: Tensor, books: Tensor, proximal: bool = True) -> Tensor:
    """As `by_logits` with one number a weight, which only the two codewords around it may have."""
    return _Nearest.apply(places, books, proximal)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class CodebookLearning:
    """How codebooks are learned: rates of codewords (shares of the weights' deviation), scales (shares of themselves) and logits."""

    mapping: Literal["scalar", "logits", "fixed"] = "scalar"
    proximal: bool = True
    level_rate: float = 1e-4
    scale_rate: float = 1e-4
    mapping_rate: float = 5e-3


@dataclass(frozen=True, eq=False)
class GroupedCodebooks:
    """Runs of rows, their ascending codebooks float32 `[runs or 1, count]`, and fp16 scales `[runs]` where they share one."""

    groups: RowGroups
    levels: Tensor
    scales: Tensor | None = None


class CodebookLinear(LearnedLinear):
    """Each weight is a codeword of its run's codebook, or the run's scale times one of the only codebook.

    Learned are codewords and scales, as fp16 keeps them, and the mapping: "scalar", a place on the line for each weight, which
    takes the nearest codeword; "logits", a number for each weight and codeword; "fixed", nothing. Rows lie run by run inside.
    """

    def __init__(self, weight: Tensor, start: GroupedCodebooks, learning: CodebookLearning, bias: Tensor | None) -> None:
        super().__init__(bias)
        self.learning = learning
        order, scales = start.groups.order, start.scales
        self.register_buffer("order", order)
        self.register_buffer("ends", start.groups.ends)
        placed = weight[order]
        self.log_scales = None if scales is None else nn.Parameter(scales.float().log())
        if scales is not None:
            placed = placed / scales.float()[start.groups.of_place][:, None]
        units = start.levels.square().mean(1, keepdim=True).sqrt()
        units = torch.where(units > 0, units, 1.0)
        self.register_buffer("units", units)
        self.levels = nn.Parameter(start.levels / units)
        rows = self._of_rows(self.books().detach())
        # A logit of the distance in half gaps; moving a place by a quarter gap changes the difference of two logits by one.
        self.register_buffer("step", mean_gap(rows) / 4)
        self.register_buffer("codes", nearest_level(placed, rows) if learning.mapping == "fixed" else None)
        self.places = nn.Parameter(placed / self.get_buffer("step")) if learning.mapping == "scalar" else None
        half_gap = 2 * self.get_buffer("step")[..., None]
        logits = -(placed[..., None] - rows[:, None]).abs() / half_gap if learning.mapping == "logits" else None
        self.logits = None if logits is None else nn.Parameter(logits)

    def books(self) -> Tensor:
        """`[runs or 1, count]`, as they will be stored; ascending unless logits belong to them one by one."""
        books = self.levels * self.get_buffer("units")
        if self.learning.mapping != "logits":
            books = books.sort(dim=1).values  # codewords that passed each other change places
        return straight_through(books, books.detach().half().float())

    def scales(self) -> Tensor | None:
        """`[runs]`, as they will be stored."""
        if self.log_scales is None:
            return None
        scales = self.log_scales.exp()
        return straight_through(scales, scales.detach().half().float())

    def weight(self) -> Tensor:
        rows = self._of_rows(self.books())
        if self.logits is not None:
            values = by_logits(self.logits, rows, self.learning.proximal)
        elif self.places is not None:
            values = by_nearest(self.places * self.get_buffer("step"), rows, self.learning.proximal)
        else:
            values = rows.gather(1, self.get_buffer("codes").long())
        scales = self.scales()
        values = values if scales is None else values * self._of_rows(scales[:, None])
        return values[torch.argsort(self.get_buffer("order"))]

    def mapped(self) -> Tensor:
        """int64 `[rows, columns]`, run by run: each weight's codeword, counted in ascending order."""
        books = self.books().detach()
        if self.logits is not None:
            rank = self._of_rows(torch.argsort(torch.argsort(books, dim=1), dim=1))
            return rank.gather(1, self.logits.detach().argmax(-1))
        if self.places is not None:
            return nearest_level(self.places.detach() * self.get_buffer("step"), self._of_rows(books)).long()
        return self.get_buffer("codes").long()

    def groups(self) -> list[dict[str, Any]]:
        mapping = [one for one in (self.places, self.logits) if one is not None]
        scales = [] if self.log_scales is None else [self.log_scales]
        rates = self.learning
        return [
            {"params": [self.levels], "lr": rates.level_rate},
            {"params": scales, "lr": rates.scale_rate},
            {"params": mapping, "lr": rates.mapping_rate},
        ]

    def finish(self) -> StoredLinear:
        levels, scales = self.books().detach().sort(dim=1).values.half(), self.scales()
        ends, order = self.get_buffer("ends"), self.get_buffer("order")
        term = Codebook.from_codes(
            self.mapped(),
            levels[:, None],
            None if scales is None else scales.detach().half()[:, None],
            bits=(levels.shape[1] - 1).bit_length(),
            row_ends=tuple(ends.tolist()) if len(ends) > 1 else (),
        )
        if torch.equal(order, torch.arange(len(order))):
            return StoredLinear(CompressedTensor((term,)))
        return StoredLinear(CompressedTensor((term,), (), (PackedPermutation.from_order(torch.argsort(order)),)))

    def _of_rows(self, values: Tensor) -> Tensor:
        """`values [runs or 1, ...]` of each row, as rows lie inside."""
        rows = len(self.get_buffer("order"))
        if len(values) == 1:
            return values.expand(rows, -1)
        return values[RowGroups(self.get_buffer("order"), self.get_buffer("ends")).of_place]
