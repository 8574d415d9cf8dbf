"""LayerWise: blocks are ranked by how much they change what runs through them; the first ones get the larger width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.core.allocation_method import AllocationMethod, AllocationProblem, Order
from fewbits.core.checks import check_range
from fewbits.core.errors import InputError
from fewbits.core.method import Paper
from fewbits.models.adapter import weight_matrix
from fewbits.pipeline.probe import ModelProbe


@dataclass(frozen=True)
class Layerwise(AllocationMethod):
    """A score for each block, one order, one cut: the most important blocks get the larger of two widths.

    "lim": minus the mean cosine between a token's hidden states before and after the block; with `first_token` the first one of
    a window counts too. "zd", without data: minus the share of the block's weights that lie more than one standard deviation
    above their mean. The order is walked until the budget is used. With three widths the first `top_share` of the blocks get
    the largest, and the rest is cut between the others. "reverse" and "random" orders are for comparison. Nothing is stored
    but what the base method stores. Departures: see the page. Raises InputError for values out of range.
    """

    measure: Literal["lim", "zd"] = "lim"
    order: Order = "importance"
    top_share: float = 0.0
    first_token: bool = False
    windows: int = 16
    seed: int = 0

    paper: ClassVar[Paper] = Paper(
        "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer Bit-Levels", "2406.17415", 2024
    )
    baseline: ClassVar[str | None] = "rtn"
    bits: ClassVar[tuple[int, ...]] = (4, 2)
    base: ClassVar[str] = "rtn:group_size=64"

    def __post_init__(self) -> None:
        check_range("top_share", self.top_share, 0, 1)
        check_range("windows", self.windows, 1, 10**6)
        for name, known in {"measure": ("lim", "zd"), "order": ("importance", "reverse", "random")}.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is not known; {', '.join(map(repr, known))} are")

    def score(self, probe: ModelProbe) -> Mapping[str, float]:
        if self.measure == "zd":
            linears = {name: list(probe.linears[name].values()) for name in probe.blocks}
            return {name: -share_above(torch.cat([weight_matrix(one).flatten() for one in mine])) for name, mine in linears.items()}
        start = 0 if self.first_token else 1
        states = [probe.states(index)[:, start:] for index in range(len(probe.blocks) + 1)]
        return {name: -mean_cosine(states[index], states[index + 1]) for index, name in enumerate(probe.blocks)}

    def allocate(self, problem: AllocationProblem, budget: float) -> dict[str, int]:
        options, ranked = problem.by_size(), problem.ordered(self.order, self.seed)
        if len(options) > 3:
            raise InputError(f"layerwise cuts one order between two or three widths, not {len(options)}; --options 4,2 would be right")
        chosen = dict.fromkeys(problem.sizes, options[0])
        spent = problem.size(list(chosen.values()))
        if spent > budget:
            raise InputError(f"a budget of {budget:.6g} bits is too small; at least {spent:.6g} would be right")
        top = int(self.top_share * len(ranked)) if len(options) == 3 else 0
        # The first blocks' largest width, then the cut, once between each two neighbouring widths.
        steps = [(part, options[-1]) for part in ranked[:top]]
        steps += [(part, option) for option in options[1:] for part in ranked[top:]]
        for part, option in steps:
            spent += problem.sizes[part][option] - problem.sizes[part][chosen[part]]
            if spent > budget:
                break
            chosen[part] = option
        return chosen


def mean_cosine(before: Tensor, after: Tensor) -> float:
    """Of the vectors `[..., features]`, one by one; exactly one where none has changed."""
    one, two = before.double(), after.double()
    # The root of a square is that number again, in binary floating point too.
    lengths = ((one * one).sum(-1) * (two * two).sum(-1)).sqrt()
    return float(((one * two).sum(-1) / lengths.clamp(min=1e-300)).mean())


def share_above(weights: Tensor) -> float:
    """The share of `weights` whose z-score is above one; scaling them by a power of two changes nothing."""
    wide = weights.double()
    return float((wide - wide.mean() > wide.std(correction=0)).double().mean())
