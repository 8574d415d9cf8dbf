"""Two bits for most groups, four for the few with a wide range, laid out alike in every row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fewbits.core.checks import check_group_size, check_positive, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.tensor import CompressedTensor
from fewbits.statistics.hessian import Hessian


@dataclass(frozen=True)
class Fast2bit(LayerMethod):
    """A `share` of the groups of `group_size` inputs at `wide_bits`, all others at `bits`, chosen once on the original weight.

    `layout="aligned"`: the same groups for all rows, by their scores' sum; the wide groups first, then the narrow, each a
    uniform term, with the groups' order (one int16 a group). `layout="free"`: each row its own groups, as many in every row,
    with one bit a group. Scales and zero points of a group are two-level: `scale_bits` and `zero_bits` codes (None: fp16) in
    runs of `second_group` rows. `outliers`, a share of the narrow weights alone, are left out of the fit and kept in one
    sparse term (fp16) of what their codes leave. Rounding is GPTQ's on these fixed grids, or to the nearest.
    Departures: the paper publishes no code and no exact sizes; scores, sizes and defaults are ours (see the page).
    Raises InputError for values out of range.
    """

    bits: int = 2
    wide_bits: int = 4
    share: float = 0.1
    group_size: int = 16
    layout: Literal["aligned", "free"] = "aligned"
    choice: Literal["sensitivity", "range"] = "sensitivity"
    outliers: float = 0.002
    outlier_choice: Literal["sensitivity", "magnitude"] = "sensitivity"
    scale_bits: int | None = 4
    zero_bits: int | None = 4
    second_group: int = 16
    rounding: Literal["gptq", "nearest"] = "gptq"
    damping: float = 0.01
    activation_order: bool = True
    block_size: int = 128

    paper: ClassVar[Paper] = Paper("Enabling Fast 2-bit LLM on GPUs: Memory Alignment and Asynchronous Dequantization", "2311.16442", 2023)
    baseline: ClassVar[str | None] = "gptq"
    needs: ClassVar = (Hessian,)

    def __post_init__(self) -> None:
        check_range("wide_bits", self.wide_bits, 1, 8)
        check_range("bits", self.bits, 1, self.wide_bits)
        check_range("share", self.share, 0, 1)
        check_range("outliers", self.outliers, 0, 0.5)
        check_range("group_size", self.group_size, 1, 2**20)
        check_group_size(self.second_group, "second_group")
        for name in ("scale_bits", "zero_bits"):
            check_range(name, 8 if getattr(self, name) is None else getattr(self, name), 1, 8)
        for name in ("damping", "block_size"):
            check_positive(name, getattr(self, name), getattr(Fast2bit, name))
        choices = {
            "layout": ("aligned", "free"),
            "choice": ("sensitivity", "range"),
            "outlier_choice": ("sensitivity", "magnitude"),
            "rounding": ("gptq", "nearest"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is not known; {', '.join(map(repr, known))} are")

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        return self.compress_group({"weight": weight}, statistics)["weight"]

    def compress_group(self, weights: Mapping[str, Tensor], statistics: Statistics) -> dict[str, CompressedTensor]:
        """Every linear that reads the same input chooses its own groups."""
        raise NotImplementedError
