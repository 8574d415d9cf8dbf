"""A compressed linear layer of which some stored tensors are trained, and all codes stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.linear import StoredLinear
from fewbits.layers.straight_through import straight_through


class TunedLinear(LearnedLinear):
    """Learns the floating-point tensors of `stored` whose last name is in `tensors`, in float32, rounded as they are stored.

    Raises InputError where there is no such tensor.
    """

    def __init__(self, stored: StoredLinear, bias: Tensor | None, tensors: Sequence[str], rate: float) -> None:
        super().__init__(bias)
        self.rate = rate
        kept = stored.tensors()
        self.names = [name for name, tensor in kept.items() if name.rpartition(".")[2] in tensors and tensor.is_floating_point()]
        if not self.names:
            raise InputError(f"nothing called {', '.join(tensors)} can be tuned among {', '.join(kept)}")
        self.kept, self.settings = kept, stored.settings()
        self.wide = _widened(self.settings, self.names)
        self.learned = nn.ParameterList([nn.Parameter(kept[name].detach().float().clone()) for name in self.names])

    def weight(self) -> Tensor:
        learned = zip(self.names, self.learned, strict=True)
        rounded = {name: straight_through(one, one.detach().to(self.kept[name].dtype).float()) for name, one in learned}
        return cast(StoredLinear, from_stored(self.wide, self.kept | rounded)).weight.decode()

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.learned), "lr": self.rate}]

    def round_inputs(self, inputs: Tensor) -> Tensor:
        activation = cast(StoredLinear, from_stored(self.settings, self.kept)).activation
        if activation is not None:
            raise InputError("layers whose activations are rounded cannot be tuned; weights only would be right")
        return inputs

    def finish(self) -> StoredLinear:
        learned = zip(self.names, self.learned, strict=True)
        tensors = self.kept | {name: one.detach().to(self.kept[name].dtype) for name, one in learned}
        return cast(StoredLinear, from_stored(self.settings, tensors))


def _widened(settings: Mapping[str, Any], names: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """The settings with the tensors called `names` in float32."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and "tensor" in value:
            found[key] = {"tensor": ["float32" if name in names else value["tensor"][0], value["tensor"][1]]}
        elif isinstance(value, Mapping) and "kind" in value:
            found[key] = _widened(value, names, f"{name}.")
        elif isinstance(value, Mapping) and "parts" in value:
            found[key] = {"parts": [_widened(part, names, f"{name}.{index}.") for index, part in enumerate(value["parts"])]}
        else:
            found[key] = value
    return found
