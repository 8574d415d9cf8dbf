"""Which of two compressed models is better, said only where the text and the arithmetic can tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fewbits.evaluation.fidelity import paired_interval

Said = Literal["better", "worse", "not distinguishable"]


@dataclass(frozen=True)
class Verdict:
    """The mean difference of two losses in nats a token, its 95% interval, and what follows from it for the first of them."""

    difference: float
    interval: tuple[float, float]
    said: Said


def judge(first: Tensor, second: Tensor, *, floor: float = 0.0, seed: int = 0) -> Verdict:
    """`first` against `second`, losses `[windows, tokens]` or `[repeats, windows, tokens]` of the same tokens.

    A difference counts where its paired 95% interval lies beyond `floor`, the nats that rounding the arithmetic alone may
    move a loss: below it two models are not distinguishable, however sure the bootstrap is. Raises InputError where the
    shapes differ.
    """
    low, high = paired_interval(first, second, seed=seed)
    said: Said = "better" if high < -floor else "worse" if low > floor else "not distinguishable"
    return Verdict(float((first.double() - second.double()).mean()), (low, high), said)


def frontier(bits: list[float], losses: list[float]) -> list[bool]:
    """Whether each point is on the Pareto frontier: no other has as few bits and as small a loss, and one of them smaller."""
    points = list(zip(bits, losses, strict=True))
    return [not any(other[0] <= one[0] and other[1] <= one[1] and other != one for other in points) for one in points]
