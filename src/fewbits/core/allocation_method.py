"""The role of a method that spends a budget of bits on the parts of a model, and what it is told of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from fewbits.core.errors import InputError
from fewbits.core.method import Method

Order = Literal["importance", "reverse", "random"]


@dataclass(frozen=True)
class AllocationProblem:
    """The parts of a model by name, in its order: layers, layers that are tied, or blocks; each gets one of `options`.

    `sizes[part][option]` are stored bits, counted from stored tensors. `losses` alike are what the option loses there, in
    whatever unit was measured. `scores` say how important a part is, where a method measured that. Raises InputError where a
    part lacks an option.
    """

    options: tuple[str, ...]
    sizes: Mapping[str, tuple[int, ...]]
    losses: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for table in (self.sizes, self.losses):
            for part, row in table.items():
                if len(row) != len(self.options) or part not in self.sizes:
                    raise InputError(f"{part}: {len(row)} numbers for {len(self.options)} options; one each would be right")

    def by_size(self) -> tuple[int, ...]:
        """The options from the smallest to the largest, by what they take over all parts."""
        return tuple(sorted(range(len(self.options)), key=lambda option: (self.size([option] * len(self.sizes)), option)))

    def ordered(self, order: Order, seed: int = 0) -> list[str]:
        """The parts, the highest score first, or the lowest, or drawn; of equal scores the model's earlier part comes first."""
        parts = list(self.sizes)
        if order == "random":
            return [parts[index] for index in torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()]
        return sorted(parts, key=lambda part: self.scores[part], reverse=order == "importance")

    def size(self, choices: list[int]) -> int:
        """Bits of one choice of option a part, in the parts' order."""
        return sum(row[choice] for row, choice in zip(self.sizes.values(), choices, strict=True))


class AllocationMethod(Method, ABC):
    """Ranks the blocks of a model and spends a budget on them in that order."""

    bits: ClassVar[tuple[int, ...]]  # of the options that the paper chooses between, where a user names no others
    base: ClassVar[str]  # what compresses the layers where a user names nothing else, as METHOD:field=value,...
    needs_budget: ClassVar[bool] = True  # False: it settles by itself how many bits are spent
    windows: int  # of the calibration text that the scores are measured on

    @abstractmethod
    def score(self, probe: Any) -> Mapping[str, float]:
        """The importance of every block by its name, measured with a pipeline.probe.ModelProbe on calibration text."""

    @abstractmethod
    def allocate(self, problem: AllocationProblem, budget: float) -> dict[str, int]:
        """The number of one option for every part; stored bits in sum at most `budget`. Raises InputError where nothing fits."""
