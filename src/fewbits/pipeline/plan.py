"""Which method compresses which layer."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any

from fewbits.core.allocation_method import AllocationMethod
from fewbits.core.errors import InputError
from fewbits.core.method import Accumulator, Method


@dataclass(frozen=True)
class Plan:
    """One method for all linears, glob patterns of layers kept dense, and patterns given another method (first match wins).

    These are linears of blocks; `embeddings` and `head` compress what reads and predicts tokens, None leaves it dense. Raises
    InputError for a method that compresses nothing itself.
    """

    method: Method
    keep: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Method], ...] = ()
    embeddings: Method | None = None
    head: Method | None = None

    def __post_init__(self) -> None:
        for one in self.methods():
            if isinstance(one, AllocationMethod):
                name = one.name()
                raise InputError(f"{name} shares bits out and compresses no layers itself; fewbits allocate -m {name} would be right")

    def keeps(self, layer_name: str) -> str | None:
        """The pattern that keeps the layer dense, or None."""
        return next((pattern for pattern in self.keep if fnmatchcase(layer_name, pattern)), None)

    def method_for(self, layer_name: str) -> Method | None:
        """The method of a layer, None where it is kept dense."""
        if self.keeps(layer_name) is not None:
            return None
        return next((method for pattern, method in self.overrides if fnmatchcase(layer_name, pattern)), self.method)

    def methods(self) -> tuple[Method, ...]:
        """Every method that compresses some layer."""
        outside = (method for method in (self.embeddings, self.head) if method is not None)
        return (self.method, *(method for _, method in self.overrides), *outside)

    def needs(self) -> set[type[Accumulator]]:
        """What is gathered of the inputs of the blocks' layers, for any of their methods."""
        return {need for method in (self.method, *(method for _, method in self.overrides)) for need in method.needs}

    def describe(self) -> dict[str, Any]:
        """JSON-able and complete: two plans with equal descriptions compress alike."""
        overrides = [[pattern, _described(method)] for pattern, method in self.overrides]
        outside = {name: _described(one) for name, one in (("embeddings", self.embeddings), ("head", self.head)) if one is not None}
        return {"method": _described(self.method), "keep": list(self.keep), "overrides": overrides} | outside


def _described(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"type": kind} | {field.name: _described(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (tuple, list)):
        return [_described(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else repr(value)
