"""ONNX: the model as a graph, with MatMulNBits or DequantizeLinear for codes, which onnxruntime runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from fewbits.core.checks import check_group_size
from fewbits.core.errors import InputError
from fewbits.export.contents import Contents
from fewbits.export.folder import copy_companions, write_config
from fewbits.export.grids import Grid, nearest_grid, read_grid
from fewbits.export.onnx.graph import cache_layers, write_graph
from fewbits.export.onnx.layer import Operator, refuses
from fewbits.export.onnx.reading import is_graph, read_layers, tensors_of
from fewbits.export.target import Target
from fewbits.layers.linear import StoredLinear
from fewbits.models.adapter import LINEAR

_WIDTHS = {"matmul_nbits": (2, 4, 8), "qdq": (4, 8)}


@dataclass(frozen=True)
class Onnx(Target):
    """A graph in model.onnx and its numbers in model.onnx.data, beside configuration and tokenizer.

    `operator` multiplies with codes: "matmul_nbits" is onnxruntime's own, "qdq" is DequantizeLinear of the standard; "auto" takes the
    first for models that write text and the second for encoders. `bits`, `group_size` (None: whole rows) and `symmetric` are for
    layers that are requantized; codes of other widths become wider ones there, which loses nothing. Raises InputError for values out
    of range.
    """

    operator: Literal["auto", "matmul_nbits", "qdq"] = "auto"
    bits: int = 4
    group_size: int | None = 32
    symmetric: bool = True

    readers: ClassVar[str] = "onnxruntime 1.18 and later (2 and 8 bits in blocks: 1.24); with operator=qdq, engines of ONNX's opset 21"
    extra: ClassVar[str | None] = "onnx"

    def __post_init__(self) -> None:
        if self.bits not in (known := _WIDTHS["qdq" if self.operator == "qdq" else "matmul_nbits"]):
            raise InputError(f"bits={self.bits} has no operator of ONNX; {', '.join(map(str, known))} would be right")
        check_group_size(self.group_size)

    def refuses(self, stored: StoredLinear) -> str | None:
        """With operator="auto", which depends on the model, what neither operator holds."""
        first, *others = self._operators
        reason = refuses(stored, first)
        return None if reason is None or any(refuses(stored, one) is None for one in others) else reason

    def refuses_model(self, contents: Contents) -> str | None:
        if (unfit := contents.unfit_module(LINEAR)) is not None:
            return unfit
        if not contents.source.is_encoder and isinstance(layers := cache_layers(contents), str):
            return layers
        operator = self._operator(contents)
        for name, stored in contents.layers() if self.operator == "auto" else ():
            if (reason := refuses(stored, operator)) is not None:
                other = next(one for one in self._operators if one != operator)
                return f"{name}: {reason}; onnx:operator={other} has a place for it"
        return None

    def requantize(self, stored: StoredLinear) -> StoredLinear | None:
        """The same codes in a width that there is, where that is all that is missing; else the nearest grid, inputs as they are."""
        wider = self._wider(stored)
        if wider is not None and self.refuses(wider) is None:
            return wider
        made = nearest_grid(stored, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)
        return None if self.refuses(made) is not None else made

    def write(self, contents: Contents, destination: Path) -> None:
        copy_companions(contents.path, destination)
        write_config(destination, contents.config)
        write_graph(contents, self._operator(contents), destination)

    def written(self, destination: Path) -> Iterator[tuple[str, Tensor]]:
        yield from tensors_of(destination)

    def recognizes(self, path: Path) -> bool:
        return is_graph(path)

    def read(self, path: Path) -> Iterator[tuple[str, StoredLinear]]:
        yield from read_layers(path)

    @property
    def _operators(self) -> tuple[Operator, ...]:
        return ("matmul_nbits", "qdq") if self.operator == "auto" else (self.operator,)

    def _operator(self, contents: Contents) -> Operator:
        if self.operator != "auto":
            return self.operator
        return "qdq" if contents.source.is_encoder else "matmul_nbits"

    def _wider(self, stored: StoredLinear) -> StoredLinear | None:
        """One grid with the next width that an operator has; zero points stay where they are."""
        if len(stored.weight.terms) != 1:
            return None
        grid = read_grid(replace(stored.weight, input_transforms=(), output_transforms=()))
        if not isinstance(grid, Grid):
            return None
        bits = next((width for width in _WIDTHS[self._operators[-1]] if width >= grid.bits), None)
        if bits is None:
            return None
        terms = replace(grid, bits=bits, symmetric=grid.symmetric and bits == grid.bits).stored().terms
        return replace(stored, weight=replace(stored.weight, terms=terms))
