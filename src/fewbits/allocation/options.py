"""What a layer may be compressed with: methods by name, at several widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, cast

from fewbits.core.allocation_method import AllocationMethod
from fewbits.core.config import configure, read_spec
from fewbits.core.errors import InputError
from fewbits.core.method import LayerMethod, Method
from fewbits.core.registry import get_method
from fewbits.pipeline.recipe import changed_fields

BITS = (2, 3, 4, 8)


def read_options(specs: Sequence[str], bits: Sequence[int] = ()) -> tuple[AllocationMethod | None, list[LayerMethod]]:
    """The method that allocates, if one is named, and the options, from specs METHOD or METHOD:field=value,...

    A spec that says its bits is one option, another one for each of `bits` (`BITS`, or those of the allocation method, where
    there are none); 16 bits are fp16. Raises InputError for a spec that is wrong, for two methods that allocate, one that
    compresses no layers, or fewer than two options.
    """
    allocator: AllocationMethod | None = None
    grids = []
    for spec in specs:
        name, values = read_spec(spec)
        method = get_method(name)
        if not issubclass(method, AllocationMethod):
            grids.append((method, values))
        elif allocator is not None:
            raise InputError(f"{allocator.name()} and {name} both allocate; one of them, and the methods that compress, would be right")
        else:
            allocator = configure(method, values)
    if not grids:
        name, values = read_spec("gptq" if allocator is None else allocator.base)
        grids = [(get_method(name), values)]
    widths = bits or (BITS if allocator is None else allocator.bits)
    found: list[LayerMethod] = []
    for method, values in grids:
        found += [option for option in _widths(method, values, widths) if option not in found]
    if len(found) < 2:
        raise InputError(
            f"{', '.join(map(label, found))} leaves nothing to choose; two options or more, such as --options 2,4, would be right"
        )
    return allocator, found


def label(method: Method) -> str:
    """METHOD:field=value,... with the fields that differ from their defaults."""
    values = ",".join(f"{name}={'none' if value is None else value}" for name, value in changed_fields(method).items())
    return f"{method.name()}:{values}" if values else method.name()


def _widths(method: type[Method], values: dict[str, str], widths: Sequence[int]) -> list[LayerMethod]:
    if not issubclass(method, LayerMethod):
        raise InputError(f"{method.name()} does not compress single layers; a layer method such as gptq would be right")
    known: list[str] = [field.name for field in fields(cast(Any, method))] if is_dataclass(method) else []
    if "bits" in values or "bits" not in known:
        return [configure(method, values)]
    half = cast(LayerMethod, configure(get_method("rtn"), {"bits": 16}))
    return [half if width == 16 else configure(method, {**values, "bits": width}) for width in widths]
