"""Which blocks hold a term exactly, and which term a block is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.tensor import Term
from fewbits.formats.block_grid import BlockGrid
from fewbits.formats.stepped import Stepped
from fewbits.formats.uniform import Uniform
from fewbits.layers.linear import StoredLinear
from fewbits.models.gguf.blocks import TYPES, BlockType

PLAIN = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}  # types of numbers as they are, by their number in the file


@dataclass(frozen=True, eq=False)
class Blocks:
    """A tensor as the file has it: the type's number there, uint8 `[rows, bytes]`, and the shape that it stands for."""

    type_number: int
    data: Tensor
    shape: tuple[int, ...]

    def ordered(self, rows: Tensor | None) -> Blocks:
        """The same with row `rows[i]` at place i; a vector's numbers are its rows. None: as it is."""
        if rows is None:
            return self
        if len(self.shape) == 1:
            return Blocks(self.type_number, self.data.reshape(len(rows), -1)[rows].reshape(1, -1), self.shape)
        return Blocks(self.type_number, self.data[rows], self.shape)


def held(stored: StoredLinear) -> Blocks | str:
    """The blocks that are exactly the weight of a layer, or why there are none."""
    weight = stored.weight
    if stored.activation is not None:
        return f"its inputs are rounded by {stored.activation.kind}, and llama.cpp rounds them its own way"
    if weight.input_transforms or weight.output_transforms:
        kinds = [transform.kind for transform in weight.input_transforms + weight.output_transforms]
        return f"{kinds[0]} transforms its {'inputs' if weight.input_transforms else 'outputs'}, and a block holds nothing but weights"
    if len(weight.terms) > 1:
        return f"it is a sum of {' and '.join(term.kind for term in weight.terms)}, and a tensor is one block type"
    term = weight.terms[0]
    fitted = _uniform(term) if isinstance(term, Uniform) else _stepped(term) if isinstance(term, Stepped) else None
    if fitted is None:
        return f"no block type holds a term of kind {term.kind}"
    if isinstance(fitted, str):
        return fitted
    kind, fields = fitted
    return Blocks(kind.number, kind.encode(fields), term.shape)


def plain(values: Tensor) -> Blocks:
    """Numbers as they are, a vector or a matrix: float32, fp16 or bfloat16."""
    rows = values if values.ndim > 1 else values[None]
    return Blocks(PLAIN[values.dtype], rows.contiguous().view(torch.uint8), tuple(values.shape))


def read_term(kind: BlockType, data: Tensor) -> Term:
    """The term that blocks `data`, uint8 `[rows, bytes]`, stand for; its codes are theirs.

    Raises InputError for a part of a block or a scale that is not finite.
    """
    return kind.grid.term(kind.decode(data))


_Fitted = tuple[BlockType, Mapping[str, Tensor]]


def _uniform(term: Uniform) -> _Fitted | str:
    if isinstance(term.scales, Term):
        if term.zero_points is None and (kind := _two_level(term, term.scales, Uniform)) is not None:
            return kind, _fields(term, {"scales": term.scales})
        return _two_level_reason(term)
    scales = _for_blocks(term.scales, term)
    if isinstance(scales, str):
        return scales
    if term.zero_points is None:
        kind = _one_level(term.bits_per_code, minimums=False)
        return (kind, {"codes": term.unpacked_codes(), "scales": scales}) if kind else _width(term, "with a symmetric grid")
    kind = _one_level(term.bits_per_code, minimums=True)
    if kind is None:
        return _width(term, "with zero points")
    zeros = term.unpacked_zero_points()
    minimums = _for_blocks(-zeros * term.scales.float(), term)
    if isinstance(minimums, str):
        return f"zero points times scales are not fp16 numbers, as {kind.name}'s minimums must be; a symmetric grid would be right"
    return kind, {"codes": term.unpacked_codes(), "scales": scales, "minimums": minimums}


def _stepped(term: Stepped) -> _Fitted | str:
    if isinstance(term.steps, Term) or isinstance(term.minimums, Term):
        both = {"scales": term.steps, "minimums": term.minimums}
        kinds = [_two_level(term, one, Stepped) for one in both.values()]
        if kinds[0] is None or kinds[0] is not kinds[1]:
            return _two_level_reason(term)
        fields = _fields(term, both)
        return kinds[0], fields | {"super_minimums": -fields["super_minimums"]}
    kind = _one_level(term.bits_per_code, minimums=True)
    if kind is None:
        return _width(term, "with minimums")
    scales = _for_blocks(term.steps, term)
    minimums = _for_blocks(torch.zeros_like(term.steps) if term.minimums is None else term.minimums, term)
    if isinstance(scales, str) or isinstance(minimums, str):
        return scales if isinstance(scales, str) else str(minimums)
    return kind, {"codes": term.unpacked_codes(), "scales": scales, "minimums": minimums}


def _one_level(bits: int, *, minimums: bool) -> BlockType | None:
    return next((one for one in TYPES.values() if _grid(one.grid) == (bits, minimums, None)), None)


def _grid(grid: BlockGrid) -> tuple[int, bool, int | None]:
    return grid.bits, grid.minimums, grid.scale_bits


def _two_level(term: Uniform | Stepped, numbers: object, inner: type[Uniform] | type[Stepped]) -> BlockType | None:
    """The type whose groups, scales and super-scales are those of `term` and its `numbers`, scales or minimums."""
    if not isinstance(numbers, inner) or (numbers.minimums if isinstance(numbers, Stepped) else numbers.zero_points) is not None:
        return None
    units = numbers.steps if isinstance(numbers, Stepped) else numbers.scales
    if not isinstance(units, Tensor) or units.dtype != torch.float16 or units.shape[0] != term.rows:
        return None
    for kind in TYPES.values():
        grid = kind.grid
        if _grid(grid) == (term.bits_per_code, isinstance(term, Stepped), numbers.bits_per_code):
            sizes = (term.group_size, numbers.group_size)
            return kind if sizes == (grid.group_size, grid.groups) and term.columns % grid.span == 0 else None
    return None


def _fields(term: Uniform | Stepped, numbers: Mapping[str, object]) -> dict[str, Tensor]:
    found = {"codes": term.unpacked_codes()}
    for name, one in numbers.items():
        assert isinstance(one, (Uniform, Stepped))
        units = one.steps if isinstance(one, Stepped) else one.scales
        assert isinstance(units, Tensor)
        found |= {name: one.unpacked_codes(), f"super_{name}": units}
    return found


def _for_blocks(values: Tensor, term: Uniform | Stepped) -> Tensor | str:
    """One fp16 number for every 32 columns of a row, of `values [rows or 1, groups]`; or why that is not exact."""
    if term.columns % 32 or (term.group_size % 32 and values.shape[1] > 1):
        return f"{term.columns} columns in groups of {term.group_size} do not fill blocks of 32; a multiple of 32 for both would"
    halves = values.half()
    if not torch.equal(halves.float(), values.float()):
        return f"scales in {str(values.dtype).removeprefix('torch.')} are not fp16 numbers; fp16 scales would be right"
    group = torch.arange(0, term.columns, 32, device=values.device) // term.group_size
    return halves[:, group].expand(term.rows, -1).contiguous()


def _width(term: Uniform | Stepped, grid: str) -> str:
    return f"no block type has {term.bits_per_code}-bit codes {grid} and fp16 scales; 4 or 5 bits would be right, or 8 for a symmetric grid"


def _two_level_reason(term: Uniform | Stepped) -> str:
    known = ", ".join(name for name, one in TYPES.items() if one.grid.scale_bits)
    return (
        f"the two-level scales of {term.kind} codes of {term.bits_per_code} bits in groups of {term.group_size} of {term.columns} columns "
        f"are those of no block type ({known}, whose columns are a multiple of 256)"
    )
