"""AWQ: 4-bit codes, eight outputs a word in an order of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.core.checks import check_group_size
from fewbits.core.errors import InputError
from fewbits.export.contents import Contents
from fewbits.export.folder import compressed_modules, copy_companions, quantization_config, write_config, write_shards
from fewbits.export.grids import Grid, half_grid, nearest_grid
from fewbits.export.target import Target
from fewbits.export.words import from_words, to_words
from fewbits.layers.linear import StoredLinear
from fewbits.models.source import open_model

_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # the output, of eight, whose code each nibble holds, from the lowest on
_PLACE = torch.argsort(_ORDER)


@dataclass(frozen=True)
class Awq(Target):
    """The layout called gemm. Of a layer `[out, in]`: `qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8], `scales` fp16
    [groups, out].

    One group size for all layers. `group_size` (None: whole rows) is for layers that are requantized, and then should be that of
    the others. Source: the layout of AutoAWQ. Raises InputError for values out of range.
    """

    group_size: int | None = 128

    separates_experts: ClassVar[bool] = True
    readers: ClassVar[str] = "GPTQModel, transformers with it, AutoAWQ, vLLM, SGLang"

    def __post_init__(self) -> None:
        check_group_size(self.group_size)

    def refuses(self, stored: StoredLinear) -> str | None:
        grid = _grid(stored)
        return grid if isinstance(grid, str) else None

    def refuses_model(self, contents: Contents) -> str | None:
        if (unfit := contents.unfit_module()) is not None:
            return unfit
        sizes: dict[tuple[int, bool], str] = {}
        for name, stored in contents.layers():
            if isinstance(grid := _grid(stored), Grid):
                sizes.setdefault((grid.group_size, grid.whole_rows), name)
        if _common(set(sizes)) is None:
            said = ", ".join(f"{name} has groups of {size}" for (size, _), name in sizes.items())
            return f"the format has one group size, and {said}"
        return None

    def requantize(self, stored: StoredLinear) -> StoredLinear | None:
        """The nearest 4-bit grid, and inputs as they are; None where outputs do not fill words."""
        made = nearest_grid(stored, bits=4, group_size=self.group_size, symmetric=False)
        return None if self.refuses(made) is not None else made

    def write(self, contents: Contents, destination: Path) -> None:
        copy_companions(contents.path, destination)
        sizes: set[tuple[int, bool]] = set()
        write_shards(destination, self._tensors(contents, sizes))
        config: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": _common(sizes), "zero_point": True, "version": "gemm"}
        write_config(destination, contents.config | {"quantization_config": config | {"modules_to_not_convert": contents.dense_linears()}})

    def recognizes(self, path: Path) -> bool:
        return quantization_config(path).get("quant_method") == "awq"

    def read(self, path: Path) -> Iterator[tuple[str, StoredLinear]]:
        source, described = open_model(path), quantization_config(path)
        if int(described.get("bits", 4)) != 4 or str(described.get("version", "gemm")).lower() != "gemm":
            raise InputError(f"{path} is AWQ of {described.get('bits')} bits, {described.get('version')}; 4 bits, gemm, would be right")
        if not described.get("zero_point", True):
            raise InputError(f"{path} is AWQ without zero points, which engines read in different ways; zero_point true would be right")
        for name in compressed_modules(source, "qweight"):
            qweight, qzeros, scales = (source.tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
            columns, rows = qweight.shape[0], 8 * qweight.shape[1]
            if columns % len(scales) or qzeros.shape != (len(scales), rows // 8) or scales.shape[1] != rows:
                raise InputError(f"{path}: {name}: {len(scales)} groups do not fit {[rows, columns]}")
            codes, zeros = _unpacked(qweight), _unpacked(qzeros)
            symmetric = bool((zeros == 8).all())
            yield name, StoredLinear(Grid(codes, scales.T.contiguous(), zeros, symmetric, 4, columns // len(scales)).stored())

    def _tensors(self, contents: Contents, sizes: set[tuple[int, bool]]) -> Iterator[tuple[str, Tensor]]:
        for name, stored in contents.layers():
            grid = _grid(stored)
            assert isinstance(grid, Grid)  # `refuses` was asked
            sizes.add((grid.group_size, grid.whole_rows))
            yield f"{name}.qweight", _packed(grid.codes)
            yield f"{name}.qzeros", _packed(grid.zero_points)
            yield f"{name}.scales", grid.scales.T
        yield from contents.dense()


def _grid(stored: StoredLinear) -> Grid | str:
    """The grid that the format holds, in the inputs' own order, or why it holds none."""
    read = half_grid(stored)
    if isinstance(read, str):
        return read
    if (grid := read.unordered()) is None:
        return "a permutation of its inputs scatters its groups, and group indices have no place there"
    rows, columns = grid.codes.shape
    if grid.bits != 4:
        return f"its codes have {grid.bits} bits, where 4 have a layout"
    if rows % 8:
        return f"its {rows} outputs do not fill words of eight"
    if columns % grid.group_size:
        return f"groups of {grid.group_size} do not divide its {columns} inputs"
    return grid


def _packed(values: Tensor) -> Tensor:
    """`values [outputs, columns]` below 16 to int32 `[columns, outputs / 8]`."""
    return to_words(values.T.unflatten(1, (-1, 8))[..., _ORDER].flatten(1), 4)


def _unpacked(words: Tensor) -> Tensor:
    """The inverse: uint8 `[outputs, columns]`."""
    return from_words(words, 4, 8 * words.shape[1]).unflatten(1, (-1, 8))[..., _PLACE].flatten(1).T.contiguous()


def _common(sizes: set[tuple[int, bool]]) -> int | None:
    """The group size that the file says of layers with `sizes` and whether each is a whole row: -1 where all are."""
    if all(whole for _, whole in sizes):
        return -1
    found = {size for size, _ in sizes}
    return found.pop() if len(found) == 1 else None
