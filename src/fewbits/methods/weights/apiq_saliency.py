"""Saliency-aware partial retraining: ApiQ with a regularizer that keeps the weights that the loss depends on where they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fewbits.core.checks import check_group_size, check_positive, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import BlockMethod, Paper, Statistics
from fewbits.layers.learned_clip import ClipOptions, LearnedClip
from fewbits.solvers.budget import affordable_rank
from fewbits.statistics.moments import Moments

_STAGES = {"mixed": ("mixed",), "weights first": ("weights", "mixed"), "output last": ("mixed", "output")}


@dataclass(frozen=True)
class ApiqSaliency(BlockMethod):
    """ApiQ's training with `weight` * R added, R = sum of S * (W_eff - W)**2 over the block's weights.

    S is the loss's squared gradient, summed over single samples of the dense model. R is measured in units of its value at
    the first step, and counts as much as `weight` times the output loss of that step; W_eff is W^, or, "after_lora", W^ and
    the low-rank branch. `stages` takes turns of equal length: "weights" lowers R alone, "output" the output loss alone.
    Stored: as by ApiQ, uniform codes with an fp16 scale and a whole zero point a group, and fp16 factors whose rank is cut so
    that they take at most `adapter_bits` a weight, but is at least 1. Departures: see the page. Raises InputError for values
    out of range.
    """

    bits: int = 2
    group_size: int | None = 64
    adapter_rank: int = 64
    adapter_bits: float = 0.5
    alpha: float = 16.0
    saliency: Literal["fisher", "none", "permuted"] = "fisher"  # S; "none": ones; "permuted": shuffled within each matrix
    weight: float = 0.1
    penalized: Literal["before_lora", "after_lora"] = "before_lora"
    stages: Literal["mixed", "weights first", "output last"] = "mixed"
    clip_rate: float = 2e-2
    adapter_rate: float = 1e-3
    decay: float = 0.1
    steps: int = 400
    batch_size: int = 1
    seed: int = 0

    paper: ClassVar[Paper] = Paper(
        "Enhancing Ultra-Low-Bit Quantization of Large Language Models Through Saliency-Aware Partial Retraining", "2504.13932", 2025
    )
    baseline: ClassVar[str | None] = "apiq"
    needs: ClassVar = (Moments,)
    uses_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_group_size(self.group_size)
        check_range("adapter_rank", self.adapter_rank, 1, 10**6)
        for name in ("adapter_bits", "alpha"):
            check_positive(name, getattr(self, name), getattr(ApiqSaliency, name))
        for name in ("clip_rate", "adapter_rate", "decay"):
            check_range(name, getattr(self, name), 0, 10)
        check_range("weight", self.weight, 0, 10**6)
        check_range("steps", self.steps, 0, 10**7)
        check_range("batch_size", self.batch_size, 1, 10**6)
        choices = {
            "saliency": ("fisher", "none", "permuted"),
            "penalized": ("before_lora", "after_lora"),
            "stages": tuple(_STAGES),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is not known; {', '.join(map(repr, known))} are")

    def sensitivity(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """S (section 3.3): squared for each sample, not of their sum."""
        return gradient.square()

    def begin(self, weight: Tensor, bias: Tensor | None, statistics: Statistics) -> nn.Module:
        rank = affordable_rank(weight.shape[0], weight.shape[1], self.adapter_rank, self.adapter_bits)
        options = ClipOptions(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=False,
            rank=rank,
            scaling=self.alpha / rank,
            clip_rate=self.clip_rate,
            adapter_rate=self.adapter_rate,
            decay=self.decay,
            seed=self.seed,
        )
        return LearnedClip(weight, bias, options, self._saliency(statistics.sensitivity), self.penalized)

    def loss(self, outputs: Tensor, dense: Tensor, mixed: Tensor) -> Tensor:
        """Mean squared distance to the dense block's outputs, on the dense model's inputs."""
        return (outputs.float() - dense.float()).square().mean()

    def total(self, loss: Tensor, penalty: Tensor, first: tuple[float, float], progress: float) -> Tensor:
        """R in units that do not depend on how many samples S was summed over, or how long they were."""
        loss_then, penalty_then = first
        turns = _STAGES[self.stages]
        turn = turns[min(int(progress * len(turns)), len(turns) - 1)]
        relative = self.weight * loss_then / max(penalty_then, 1e-30) * penalty
        return {"mixed": loss + relative, "weights": relative, "output": loss}[turn]

    def _saliency(self, squares: Tensor) -> Tensor:
        if self.saliency == "none":
            return torch.ones_like(squares)
        if self.saliency == "permuted":
            order = torch.randperm(squares.numel(), generator=torch.Generator().manual_seed(self.seed))
            return squares.flatten()[order].view(squares.shape)
        return squares
