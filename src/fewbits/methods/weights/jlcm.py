"""JLCM: runs of alike rows share a codebook, and codebooks are learned together with which codeword each weight takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fewbits.core.checks import check_positive, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import BlockMethod, Paper, Statistics
from fewbits.layers.learned_codebook import CodebookLearning, CodebookLinear, GroupedCodebooks
from fewbits.solvers.row_groups import GROUPINGS, RowGroups, group_levels, group_rows, scaled_levels, spread

_MOST_LOGITS = 2**26  # of one layer; training holds four numbers for each
_CHOICES = {
    "mode": ("codebooks", "scales"),
    "grouping": GROUPINGS,
    "mapping": ("scalar", "logits", "fixed"),
    "gradient": ("proximal", "default"),
}


@dataclass(frozen=True)
class Jlcm(BlockMethod):
    """w = C_g[i]: rows of alike spread lie next to each other, and each run g of them has 2**bits levels of its own.

    With mode "scales" w = s_g C[i] with one codebook, found by k-means that counts an error with s_g**2. `groups` None: as
    many as `overhead` bits a weight pay for. Codewords, scales and indices are learned together against the dense block's
    outputs; the gradient of an index falls with the distance of the codeword that it would go to (`gradient`; "default": it
    grows). `mapping`: "scalar", one number a weight and its two neighbouring codewords; "logits", one for each codeword;
    "fixed" learns codebooks alone. Stored: packed codes, fp16 codebooks or scales, and the rows' order, which inner channels
    of a gated MLP do not need (`sorts_channels`). Departures: see the page; the paper leaves much open and has no public
    code. Raises InputError for values out of range, and for logits of a layer too large for them.
    """

    bits: int = 3
    groups: int | None = None
    overhead: float = 0.02
    mode: Literal["codebooks", "scales"] = "codebooks"
    grouping: Literal["sorted", "clustered", "unsorted"] = "sorted"
    mapping: Literal["scalar", "logits", "fixed"] = "scalar"
    gradient: Literal["proximal", "default"] = "proximal"
    mapping_rate: float = 5e-3
    level_rate: float = 1e-4
    scale_rate: float = 1e-4
    steps: int = 200
    batch_size: int = 4
    look_every: int = 40
    sorts_channels: bool = True
    seed: int = 0

    paper: ClassVar[Paper] = Paper(
        "Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings", "2309.17361", 2023
    )
    baseline: ClassVar[str | None] = "rtn"
    needs: ClassVar = ()

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_range("steps", self.steps, 0, 10**6)
        check_range("look_every", self.look_every, 0, 10**6)
        if self.groups is not None:
            check_range("groups", self.groups, 1, 10**6)
        for name in ("overhead", "mapping_rate", "level_rate", "scale_rate"):
            check_positive(name, getattr(self, name), getattr(Jlcm, name))
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is not known; {', '.join(map(repr, known))} are")

    def order_channels(self, makers: Sequence[Tensor]) -> Tensor | None:
        """By the spread of all layers that make a channel: the product of their deviations."""
        if self.grouping != "sorted" or self.groups == 1:
            return None
        return torch.argsort(torch.stack([spread(one).clamp(min=1e-30).log() for one in makers]).sum(0), stable=True)

    def begin(self, weight: Tensor, bias: Tensor | None, statistics: Statistics) -> nn.Module:
        if self.mapping == "logits" and weight.numel() * 2**self.bits > _MOST_LOGITS:
            raise InputError(f"{weight.numel()} weights have too many logits of {2**self.bits} codewords; mapping='scalar' would be right")
        sorted_before = statistics.choice is not None  # the rows are channels that were put in order
        groups = group_rows(weight, self._count(weight), "unsorted" if sorted_before else self.grouping, self.seed)
        learning = CodebookLearning(self.mapping, self.gradient == "proximal", self.level_rate, self.scale_rate, self.mapping_rate)
        return CodebookLinear(weight, self.fit(weight, groups), learning, bias)

    def fit(self, weight: Tensor, groups: RowGroups) -> GroupedCodebooks:
        """Where learning starts: k-means of each run's weights, or of all scaled ones."""
        if self.mode == "codebooks":
            return GroupedCodebooks(groups, group_levels(weight, groups, 2**self.bits))
        return GroupedCodebooks(groups, *scaled_levels(weight, groups, 2**self.bits))

    def _count(self, weight: Tensor) -> int:
        """Runs of rows: as many as were asked for, or as the overhead pays for."""
        if self.groups is not None:
            return min(self.groups, len(weight))
        numbers = self.overhead * weight.numel() / 16  # fp16
        paid = numbers / 2**self.bits if self.mode == "codebooks" else numbers - 2**self.bits
        return min(max(1, int(paid)), len(weight))
