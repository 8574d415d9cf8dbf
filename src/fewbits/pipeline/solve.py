"""Linears that read one input, compressed by a layer method: what is stored of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewbits.core.errors import NumericsError
from fewbits.core.method import LayerMethod, Statistics
from fewbits.layers.linear import StoredLinear
from fewbits.models.weights import Weights
from fewbits.pipeline.entries import layer_entry, second_moment

Solved = tuple[dict[str, StoredLinear], dict[str, Any]]  # by name: what is stored, what the manifest says


@dataclass(frozen=True)
class GroupJob:
    """Linears that read one input and have one method, with what is known of them beside the statistics of that input."""

    method: LayerMethod
    weights: Weights
    sensitivities: Mapping[str, Tensor] = field(default_factory=dict)
    choices: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Tensor | None] | None = None  # second moments to measure errors with; None: that of the statistics


@torch.no_grad()
def solve_job(statistics: Statistics, job: GroupJob) -> Solved:
    """A pure function of its arguments. Raises NumericsError with the layers' names."""
    return solve_weights(statistics, job, job.weights.matrices())


def solve_weights(statistics: Statistics, job: GroupJob, weights: Mapping[str, Tensor]) -> Solved:
    """As `solve_job`, for the job's `weights [out, in]` by name."""
    known = Statistics(*statistics, tokens=statistics.tokens, sensitivities=job.sensitivities, choices=job.choices)
    stored = solve_group(job.method, weights, known)
    tokens = statistics.tokens if job.method.needs else None
    entries, seen = {}, second_moment(statistics)
    for name, layer in stored.items():
        moment = seen if job.moments is None else job.moments[name]
        entries[name] = layer_entry(name, weights[name], layer, moment, tokens)
    return stored, entries


def solve_group(method: LayerMethod, weights: Mapping[str, Tensor], statistics: Statistics) -> dict[str, StoredLinear]:
    """A pure function of its arguments; `weights [out, in]` by the layers' names. Raises NumericsError with these names."""
    try:
        tensors = method.compress_group(weights, statistics)
    except NumericsError as error:
        raise NumericsError(f"{', '.join(weights)}: {error}") from error
    return {
        name: StoredLinear(tensor, method.activation(statistics, tensor), method.offset(weights[name], tensor, statistics))
        for name, tensor in tensors.items()
    }
