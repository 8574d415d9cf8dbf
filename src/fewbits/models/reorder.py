"""Inner channels of a block in another order, which leaves what the block computes as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from fewbits.models.adapter import oriented, weight_matrix
from fewbits.models.channels import find_channels


def reorder_channels(
    name: str, block: nn.Module, linears: Mapping[str, nn.Module], choose: Callable[[Sequence[Tensor]], Tensor | None]
) -> dict[str, Tensor]:
    """Put channels that linear layers of `block` make, and linear layers alone read, in the order that `choose` gives.

    `choose` sees the weights `[channels, in]` of the layers that make them. Changed are layers in `linears`, by full name;
    channels of a layer with a bias or a batch normalization stay, as those would have to be stored anew. Returns the order
    `[channels]` by the full name of each layer whose rows it became.
    """
    found: dict[str, Tensor] = {}
    channels = find_channels(block)
    normed = {layer.name for layer in channels.layers if layer.norm is not None}
    for link in channels.links:
        makers, readers = ([f"{name}.{one}" for one in side] for side in (link.producers, link.consumers))
        if link.one_to_one or not linears.keys() >= {*makers, *readers} or normed.intersection(link.producers):
            continue
        if any(linears[one].bias is not None for one in makers):
            continue
        order = choose([weight_matrix(linears[one]).float() for one in makers])
        if order is None or any(weight_matrix(linears[one]).shape[1] != len(order) for one in readers):
            continue
        for one in makers:
            _set(linears[one], weight_matrix(linears[one])[order])
        for one in readers:
            _set(linears[one], weight_matrix(linears[one])[:, order])
        found |= dict.fromkeys(makers, order)
    return found


def _set(linear: nn.Module, matrix: Tensor) -> None:
    linear.weight = nn.Parameter(oriented(linear, matrix).contiguous(), requires_grad=False)
