"""Steps of discrete codes inside a small subspace: PV-Tuning's V step (arXiv 2405.14852, section 3.3 and algorithm 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbits.core.checks import check_positive, check_range
from fewbits.solvers.additive import Additives, search_codes

_MOMENT = 0.95  # of Adam's second moment; the first has none, as momentum drags other groups over their borders


def largest_changes(target: Tensor, now: Tensor, unit: int, share: float) -> Tensor:
    """bool `[rows, groups]`: the ceil(share * rows * groups) groups of `unit` columns that differ most, of those that differ."""
    padding = -now.shape[1] % unit
    scores = torch.nn.functional.pad(target - now, (0, padding)).unflatten(1, (-1, unit)).norm(dim=-1)
    count = math.ceil(share * scores.numel())
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.flatten().topk(count).indices] = True
    return chosen.view(scores.shape) & (scores > 0)


def recode(found: Additives, target: Tensor, chosen: Tensor, beam: int, generator: torch.Generator) -> Tensor:
    """Codes `[rows, groups, books]` that are nearest to `target [rows, columns]` in the `chosen` groups, and as before elsewhere."""
    unit = found.codebooks.shape[2]
    scaled = torch.nn.functional.pad(target / found.scales, (0, -target.shape[1] % unit)).unflatten(1, (-1, unit))
    vectors, codes = scaled[chosen], found.codes.clone()
    if len(vectors):
        ones = torch.ones(len(vectors), 1, dtype=target.dtype)
        part = Additives(codes[chosen][:, None], found.codebooks, ones)
        for _ in range(1 if found.codebooks.shape[0] == 1 else 2):
            part = search_codes(vectors, torch.eye(unit, dtype=target.dtype), part, generator, beam)
        codes[chosen] = part.codes[:, 0]
    return codes


@dataclass
class CodeSteps:
    """Moves the codes of one matrix step by step.

    A weight-shaped buffer makes a step of Adam without momentum, of a length that is the share `rate` of the buffer's norm
    (LAMB). The `share` of groups in which it lies farthest from the decoded weight are coded anew. `decay` 1 puts the buffer
    back onto the decoded weight after each step, 0 keeps it. Raises InputError for values out of range.
    """

    rate: float = 1e-2
    share: float = 0.01
    decay: float = 0.0
    beam: int = 5
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        check_positive("rate", self.rate, 1e-2)
        check_range("share", self.share, 0, 1)
        check_range("decay", self.decay, 0, 1)
        check_range("beam", self.beam, 1, 64)
        self.buffer: Tensor | None = None
        self.second: Tensor | None = None
        self.count = 0

    def move(self, found: Additives, columns: int, gradient: Tensor) -> Tensor:
        """The codes after one step along `gradient [rows, columns]` of the loss with regard to the decoded weight."""
        now = found.decode(columns)
        if self.buffer is None or self.second is None:
            self.buffer, self.second = now.clone(), torch.zeros_like(now)
        self.count += 1
        self.second.mul_(_MOMENT).addcmul_(gradient, gradient, value=1 - _MOMENT)
        step = gradient / ((self.second / (1 - _MOMENT**self.count)).sqrt() + 1e-12)
        self.buffer -= self.rate * self.buffer.norm() / step.norm().clamp(min=1e-12) * step
        if not self.share:
            return found.codes
        chosen = largest_changes(self.buffer, now, found.codebooks.shape[2], self.share)
        codes = recode(found, self.buffer, chosen, self.beam, self.generator)
        if self.decay:
            after = Additives(codes, found.codebooks, found.scales).decode(columns)
            self.buffer = self.decay * after + (1 - self.decay) * self.buffer
        return codes
