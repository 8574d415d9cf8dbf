"""One option for all layers that takes as many bytes as an allocation does: what the allocation must beat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from fewbits.allocation.problem import LayerTrial
from fewbits.core.method import LayerMethod, Statistics
from fewbits.pipeline.gather import assume_nothing

_GROUPS, _GROUP, _ROWS = 8, 16, 8  # of the small layer on which a group's overhead is counted


def uniform_candidates(options: Sequence[LayerMethod], trials: Mapping[str, LayerTrial], spent: int) -> Iterator[LayerMethod]:
    """The first option's method for all layers, at the most bits of the options that fit in `spent` bits, its groups as large as
    still make it about as large as `spent`; then smaller and smaller groups. Nothing for methods without groups.
    """
    fields = {"bits", "group_size"}
    first = options[0]
    family = [one for one in options if type(one) is type(first) and fields <= vars(one).keys() and one.bits != 16]  # type: ignore[attr-defined]
    widths = sorted({cast(Any, one).bits for one in family})
    columns = {trial.columns for trial in trials.values()}
    sizes = sorted({-(-width // groups) for width in columns for groups in range(1, width // 8 + 1)}, reverse=True)
    if not widths or not sizes:
        return
    estimates = {bits: _estimates(replace(cast(Any, family[0]), bits=bits), trials, sizes) for bits in widths}
    bits = max((bits for bits in widths if estimates[bits][0] <= spent), default=widths[0])
    for size, estimate in zip(sizes, estimates[bits], strict=True):
        if estimate >= spent:
            yield replace(cast(Any, family[0]), bits=bits, group_size=size)


def nearest_option(options: Sequence[LayerMethod], trials: Mapping[str, LayerTrial], spent: int) -> LayerMethod:
    """The option that takes the most bits within `spent` where all layers have it, or the smallest one."""
    totals = [sum(trial.sizes[index] for trial in trials.values()) for index in range(len(options))]
    within = [index for index, total in enumerate(totals) if total <= spent]
    return options[max(within, key=totals.__getitem__) if within else totals.index(min(totals))]


def _estimates(method: LayerMethod, trials: Mapping[str, LayerTrial], sizes: Sequence[int]) -> list[float]:
    """Bits of all layers for every group size: codes, and what a small layer stores beside them for each group of a row."""
    statistics = Statistics(*(need(_GROUPS * _GROUP) for need in method.needs), tokens=1)
    assume_nothing(statistics)
    weight = torch.randn(_ROWS, _GROUPS * _GROUP, generator=torch.Generator().manual_seed(0))
    small = replace(cast(Any, method), group_size=_GROUP).compress_group({"layer": weight}, statistics)["layer"]
    bits = cast(Any, method).bits
    overhead = (sum(small.bits().values()) - bits * weight.numel()) / (_ROWS * _GROUPS)
    totals = []
    for size in sizes:
        groups = sum(trial.weights // trial.columns * -(-trial.columns // size) for trial in trials.values())
        totals.append(sum(trial.weights * bits for trial in trials.values()) + overhead * groups)
    return totals
