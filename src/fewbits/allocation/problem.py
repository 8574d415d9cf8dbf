"""From trials of single layers to the problem that a solver or a method is given, and back to the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fewbits.core.allocation_method import AllocationProblem

Parts = Literal["layer", "fused", "block"]


@dataclass(frozen=True)
class LayerTrial:
    """What every option takes and loses in one layer; `fused` is common to the layers that an engine computes as one."""

    block: str
    fused: str
    weights: int
    columns: int
    sizes: tuple[int, ...]  # stored bits
    losses: tuple[float, ...]


def group_layers(trials: Mapping[str, LayerTrial], parts: Parts) -> dict[str, tuple[str, ...]]:
    """The layers of each part that gets one option as a whole, by the part's name, in the model's order."""
    found: dict[str, tuple[str, ...]] = {}
    for name, trial in trials.items():
        part = {"layer": name, "fused": trial.fused, "block": trial.block}[parts]
        found[part] = (*found.get(part, ()), name)
    return found


def state_problem(
    options: Sequence[str],
    trials: Mapping[str, LayerTrial],
    grouped: Mapping[str, Sequence[str]],
    scores: Mapping[str, float] | None = None,
) -> AllocationProblem:
    """A part takes what its layers take together, and loses what they lose: losses of single layers are taken to add up."""
    indices = range(len(options))
    sizes = {part: tuple(sum(trials[one].sizes[i] for one in layers) for i in indices) for part, layers in grouped.items()}
    losses = {part: tuple(sum(trials[one].losses[i] for one in layers) for i in indices) for part, layers in grouped.items()}
    return AllocationProblem(tuple(options), sizes, losses, dict(scores or {}))


def spread(chosen: Mapping[str, int], grouped: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Every layer's option, of its part's."""
    return {layer: chosen[part] for part, layers in grouped.items() for layer in layers}


def fused_name(block: str, group: Sequence[str], layer: str) -> str:
    """The name of what an engine computes together with `layer`, which reads one input with the layers of `group`.

    All experts of a block are one; else linears that read the same tensor in the same module (queries, keys and values, or gate
    and up), called after the first of them. A feed-forward layer beside attention reads its input too, but is computed apart.
    """
    if ".experts." in layer:
        return f"{block}.experts"
    return next(one for one in group if one.rpartition(".")[0] == layer.rpartition(".")[0])
