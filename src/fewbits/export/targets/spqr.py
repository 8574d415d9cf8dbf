"""SpQR: codes of 3 bits in tiles of 16 x 16 with scales of two levels, and single weights that add to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.export.contents import Contents
from fewbits.export.folder import compressed_modules, copy_companions, quantization_config, write_config, write_shards
from fewbits.export.grids import input_order, rounds_inputs, transforms_outputs
from fewbits.export.target import Target
from fewbits.export.tiles import BITS, SIDE, Tiles, from_words
from fewbits.formats.permutation import Permutation
from fewbits.formats.sparse import Sparse
from fewbits.formats.transposed import Transposed
from fewbits.formats.uniform import Uniform
from fewbits.layers.linear import StoredLinear
from fewbits.models.source import open_model
from fewbits.solvers.two_level import as_term, fit_range, fit_second_level, round_with

_PARTS = ("dense_weights", "row_offsets", "col_vals", "in_perm")
_WIDEST = 2**15  # column indices are signed numbers of 16 bits


@dataclass(frozen=True, eq=False)
class Held:
    """What a layer is to the format: its tiles, what adds to them, and which input each column multiplies."""

    tiles: Tiles
    outliers: Sparse | None
    order: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """By their names inside the module."""
        rows, columns = self.tiles.codes.shape
        order = torch.arange(columns) if self.order is None else self.order
        # A tensor without numbers is no tensor to many readers, so a layer without outliers has one of value zero.
        last = torch.nn.functional.pad(torch.ones(1, dtype=torch.int32), (rows, 0))
        nothing = Sparse(torch.zeros(1, dtype=torch.float16), torch.zeros(1, dtype=torch.int16), last, columns)
        sparse = self.outliers or nothing
        pairs = torch.stack([sparse.column_indices, sparse.values.view(torch.int16)], 1)
        return {
            "dense_weights": self.tiles.words(),
            "row_offsets": sparse.row_pointers,
            "col_vals": pairs.view(torch.int32).flatten(),
            "in_perm": order.to(torch.int16).view(torch.int32),
        }


@dataclass(frozen=True)
class Spqr(Target):
    """Of a layer `[out, in]`: `dense_weights` int64 [out * in / 16] (export/tiles.py), `row_offsets` int32 [out + 1] and
    `col_vals` int32, a column in its lower half and an fp16 number that is added there in the upper, `in_perm` int32 [in / 2],
    two numbers of 16 bits each: which input a column multiplies.

    Files whose outliers are stored for 16 rows at a time are read too. Source: the layout of the package spqr_quant, 0.2.
    """

    readers: ClassVar[str] = "transformers with the package spqr_quant, on CUDA"

    def refuses(self, stored: StoredLinear) -> str | None:
        held = hold(stored)
        return held if isinstance(held, str) else None

    def refuses_model(self, contents: Contents) -> str | None:
        for name in contents.names:
            if contents.has_bias(name):
                return f"{name} adds a bias, and the format's layers add none"
        return contents.unfit_module()

    def requantize(self, stored: StoredLinear) -> StoredLinear | None:
        """The nearest code on min-max grids of two levels; no outliers. None where tiles do not fill the matrix."""
        rows, columns = stored.weight.shape
        if _unfit_size(rows, columns) is not None:
            return None
        return StoredLinear(nearest_tiles(stored.weight.decode()), None, stored.offset)

    def write(self, contents: Contents, destination: Path) -> None:
        copy_companions(contents.path, destination)
        shapes: dict[str, int] = {}
        write_shards(destination, self._tensors(contents, shapes))
        config = {"quant_method": "spqr", "bits": BITS, "beta1": SIDE, "beta2": SIDE, "shapes": shapes}
        config |= {"modules_to_not_convert": contents.kept_names()}
        write_config(destination, contents.config | {"quantization_config": config})

    def recognizes(self, path: Path) -> bool:
        return quantization_config(path).get("quant_method") == "spqr"

    def read(self, path: Path) -> Iterator[tuple[str, StoredLinear]]:
        source, described = open_model(path), quantization_config(path)
        if (described.get("bits", BITS), described.get("beta1", SIDE), described.get("beta2", SIDE)) != (BITS, SIDE, SIDE):
            raise InputError(f"{path} is not in 3 bits and tiles of 16 x 16, which alone have a layout; those would be right")
        shell = source.shell()
        for name in compressed_modules(source, _PARTS[0]):
            shape = shell.get_parameter(f"{name}.weight").shape
            try:
                yield name, StoredLinear(_read([source.tensor(f"{name}.{part}") for part in _PARTS], shape[0], shape[1]))
            except InputError as error:
                raise InputError(f"{path}: {name}: {error}") from error

    def _tensors(self, contents: Contents, shapes: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the file; `shapes` is filled with the lengths of the compressed ones, as readers ask for them."""
        for name, stored in contents.layers():
            held = hold(stored)
            assert not isinstance(held, str)  # `refuses` was asked
            for part, tensor in held.tensors().items():
                shapes[f"{name}.{part}.shape"] = tensor.numel()
                yield f"{name}.{part}", tensor
        yield from contents.dense()


def hold(stored: StoredLinear) -> Held | str:
    """A layer as the format has it, or why it has no place there."""
    weight, order = stored.weight, input_order(stored.weight)
    if (reason := rounds_inputs(stored) or transforms_outputs(weight)) is not None:
        return reason
    if isinstance(order, str):
        return order
    base, rest = weight.terms[0], weight.terms[1:]
    if not isinstance(base, Uniform) or not all(isinstance(term, Sparse) for term in rest) or len(rest) > 1:
        return f"its terms are {' + '.join(term.kind for term in weight.terms)}, where uniform, or uniform + sparse, has a place"
    if (unfit := _unfit_size(*base.shape)) is not None:
        return unfit
    if (base.bits_per_code, base.group_size) != (BITS, SIDE):
        return f"its codes have {base.bits_per_code} bits in groups of {base.group_size}, where 3 bits in groups of 16 have a layout"
    scales, zeros = _second(base.scales), _second(base.zero_points)
    if scales is None or zeros is None:
        return "its scales and zero points are not both of 3 bits with an fp16 scale and zero point for every 16 rows"
    outliers = next((term for term in rest if isinstance(term, Sparse)), None)
    if outliers is not None and outliers.values.dtype != torch.float16:
        return f"its single weights are {outliers.values.dtype}, where torch.float16 has a place"
    ours = (scales.scales, zeros.scales, scales.zero_points, zeros.zero_points)
    statistics = torch.stack([values.T for values in ours if isinstance(values, Tensor)], 2)
    tiles = Tiles(base.unpacked_codes(), scales.unpacked_codes().T, zeros.unpacked_codes().T, statistics)
    return Held(tiles, outliers, order)


def nearest_tiles(weight: Tensor) -> CompressedTensor:
    """`weight [rows, columns]`, both multiples of 16, rounded on min-max grids whose scales and zero points are rounded first."""
    levels, codes = [], []
    for group in weight.float().split(SIDE, dim=1):
        scale, zero = (fit_second_level(values, BITS, SIDE) for values in fit_range(group, BITS))
        codes.append(round_with(group, scale.values[:, None], zero.values[:, None], BITS))
        levels.append((scale, zero))
    scales, zeros = (as_term([pair[i] for pair in levels], BITS, SIDE) for i in (0, 1))
    whole = torch.cat(codes, 1).to(torch.uint8)
    return CompressedTensor((Uniform.from_codes(whole, scales, zeros, bits=BITS, group_size=SIDE),))


def _unfit_size(rows: int, columns: int) -> str | None:
    if rows % SIDE or columns % SIDE:
        return f"its {rows} outputs and {columns} inputs are not both multiples of 16"
    return f"its {columns} inputs are more than 32768, the most that have an index" if columns > _WIDEST else None


def _second(stored: Tensor | Term | None) -> Uniform | None:
    """The grid `[groups, rows]` of scales or zero points, where the format has a place for it."""
    inner = stored.inner if isinstance(stored, Transposed) else None
    if not isinstance(inner, Uniform) or (inner.bits_per_code, inner.group_size) != (BITS, SIDE):
        return None
    numbers = (inner.scales, inner.zero_points)
    exact = all(isinstance(values, Tensor) and values.dtype == torch.float16 and len(values) == inner.rows for values in numbers)
    return inner if exact else None


def _read(tensors: list[Tensor], rows: int, columns: int) -> CompressedTensor:
    """Raises InputError where shapes disagree, an index is out of range, or inputs are missing from the order."""
    words, offsets, pairs, order = tensors
    tiles = from_words(words, rows, columns)
    of_scales, of_zeros = (
        Transposed(
            Uniform.from_codes(
                codes.T, tiles.statistics[..., i].T.contiguous(), tiles.statistics[..., i + 2].T.contiguous(), bits=BITS, group_size=SIDE
            )
        )
        for i, codes in enumerate((tiles.scales, tiles.zeros))
    )
    terms: tuple[Term, ...] = (Uniform.from_codes(tiles.codes, of_scales, of_zeros, bits=BITS, group_size=SIDE),)
    outliers = _read_outliers(offsets, pairs, rows, columns)
    if bool(outliers.values.any()):
        terms = (*terms, outliers)
    inputs = order.view(torch.int16).int() & 0xFFFF
    if not inputs.numel() or torch.equal(inputs, torch.arange(columns, dtype=torch.int32)):
        return CompressedTensor(terms)
    if inputs.numel() != columns:
        raise InputError(f"an order of {inputs.numel()} inputs does not fit {columns}")
    return CompressedTensor(terms, (Permutation.from_order(inputs),))


def _read_outliers(offsets: Tensor, pairs: Tensor, rows: int, columns: int) -> Sparse:
    """Of files that store them row by row, or for 16 rows at a time, one entry of each after the other, filled up with zeros."""
    halves = pairs.to(torch.int32).view(torch.int16).view(-1, 2)
    indices, values = halves[:, 0].contiguous(), halves[:, 1].contiguous().view(torch.float16)
    by_tiles = offsets.numel() == rows // SIDE + 1
    rising = offsets.numel() > 0 and int(offsets[0]) == 0 and bool((offsets.diff() >= 0).all()) and int(offsets[-1]) == len(values)
    if (offsets.numel() != rows + 1 and not by_tiles) or not rising:
        raise InputError(f"{len(values)} single weights and {offsets.numel()} offsets do not fit {rows} rows")
    if len(values) and not 0 <= int(indices.min()) <= int(indices.max()) < columns:
        raise InputError(f"a single weight lies outside the {columns} columns")
    if not by_tiles:
        return Sparse(values, indices, offsets.to(torch.int32), columns)
    places = torch.arange(len(values))
    lines = torch.repeat_interleave(offsets.long().diff()) * SIDE + places % SIDE
    kept = pairs != 0
    matrix = torch.zeros(rows, columns).index_put((lines[kept], indices[kept].long()), values[kept].float())
    mask = torch.zeros(rows, columns, dtype=torch.bool).index_put((lines[kept], indices[kept].long()), torch.tensor(True))
    return Sparse.from_dense(matrix, mask)
