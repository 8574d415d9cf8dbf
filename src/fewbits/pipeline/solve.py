"""Linears that read one input, compressed by a layer method: what is stored of each."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fewbits.core.errors import NumericsError
from fewbits.core.method import LayerMethod, Statistics
from fewbits.layers.linear import StoredLinear


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
