"""ApiQ: clipping ranges and a low-rank branch are learned together, so that each block's outputs stay as they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from fewbits.core.checks import check_group_size, check_positive, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import BlockMethod, Paper, Statistics
from fewbits.layers.learned_clip import ClipOptions, LearnedClip
from fewbits.solvers.budget import affordable_rank
from fewbits.statistics.moments import Moments


@dataclass(frozen=True)
class Apiq(BlockMethod):
    """W becomes W^ + (alpha / rank) B A: the ends of each group's range and A, B are trained on the block's outputs.

    W itself stays. The target is the dense block on the dense model's inputs; the block in training reads what its compressed
    predecessors give ("both" adds the dense block on those inputs). Stored: uniform codes with an fp16 scale and a whole zero
    point a group (none if symmetric), and fp16 factors, the adapter that is trained afterwards. Its rank is cut so that it
    takes at most `adapter_bits` a weight, but is at least 1. Departures: see the page. Raises InputError for values out of
    range.
    """

    bits: int = 2
    group_size: int | None = 64
    symmetric: bool = False
    adapter_rank: int = 64
    adapter_bits: float = 0.5
    alpha: float = 16.0
    targets: Literal["dense", "both"] = "dense"
    clip_rate: float = 2e-2
    adapter_rate: float = 1e-3
    decay: float = 0.1
    steps: int = 400
    batch_size: int = 1
    seed: int = 0

    paper: ClassVar[Paper] = Paper("ApiQ: Finetuning of 2-Bit Quantized Large Language Model", "2402.05147", 2024)
    baseline: ClassVar[str | None] = "rtn"
    needs: ClassVar = (Moments,)

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 2 if self.symmetric else 1, 8)
        check_group_size(self.group_size)
        check_range("adapter_rank", self.adapter_rank, 1, 10**6)
        for name in ("adapter_bits", "alpha"):
            check_positive(name, getattr(self, name), getattr(Apiq, name))
        for name in ("clip_rate", "adapter_rate", "decay"):
            check_range(name, getattr(self, name), 0, 10)
        check_range("steps", self.steps, 0, 10**7)
        check_range("batch_size", self.batch_size, 1, 10**6)
        if self.targets not in ("dense", "both"):
            raise InputError(f"targets={self.targets!r} is not known; 'dense' or 'both' would be right")

    def begin(self, weight: Tensor, bias: Tensor | None, statistics: Statistics) -> nn.Module:
        rank = affordable_rank(weight.shape[0], weight.shape[1], self.adapter_rank, self.adapter_bits)
        options = ClipOptions(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            rank=rank,
            scaling=self.alpha / rank,
            clip_rate=self.clip_rate,
            adapter_rate=self.adapter_rate,
            decay=self.decay,
            seed=self.seed,
        )
        return LearnedClip(weight, bias, options)

    def loss(self, outputs: Tensor, dense: Tensor, mixed: Tensor) -> Tensor:
        """Mean squared distance to the dense block's outputs, on the dense model's inputs (section 4.2)."""
        distance = (outputs.float() - dense.float()).square().mean()
        return distance + (outputs.float() - mixed.float()).square().mean() if self.targets == "both" else distance
