"""Blocks of codes as GGUF files hold them, each described as runs of bytes; the inverse reads the same description.

The layouts are those of llama.cpp (ggml-common.h). Numbers are unsigned here: a type says which of its fields the file keeps with
a sign, and those count from half their range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.formats.block_grid import GRIDS, BlockGrid


@dataclass(frozen=True)
class Slice:
    """Bits `low` to `low + bits - 1` of as many numbers of a field as the run has bytes, from number `first` on."""

    field: str
    first: int
    low: int
    bits: int


@dataclass(frozen=True)
class Run:
    """`width` bytes of a block; byte i holds number i of every slice, the first slice in the lowest bits."""

    width: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class BlockType:
    """One type of tensor: a grid, and how a block of `grid.span` columns lies in bytes.

    A block's fields are those of `BlockGrid.term`; numbers of 16 bits are fp16.
    """

    name: str
    number: int  # in the file
    grid: BlockGrid
    runs: tuple[Run, ...]
    signed: tuple[str, ...] = ()

    @property
    def block_bytes(self) -> int:
        return sum(run.width for run in self.runs)

    @property
    def fields(self) -> dict[str, tuple[int, int]]:
        """How many numbers a block has of each field, and of how many bits."""
        grid = self.grid
        numbers = ["scales", "minimums"] if grid.minimums else ["scales"]
        found = {"codes": (grid.span, grid.bits)} | dict.fromkeys(numbers, (grid.groups, grid.scale_bits or 16))
        return found if grid.scale_bits is None else found | {f"super_{name}": (1, 16) for name in numbers}

    def encode(self, values: Mapping[str, Tensor]) -> Tensor:
        """uint8 `[rows, bytes]` of the fields' numbers, each `[rows, numbers]`: unsigned integers, or fp16 where it has 16 bits.

        Raises InputError where a field does not have the numbers of whole blocks.
        """
        rows, columns = values["codes"].shape
        blocks = columns // self.grid.span
        numbers = {name: self._numbers(name, values[name], (rows, blocks)) for name in self.fields}
        parts = []
        for run in self.runs:
            packed = torch.zeros(rows, blocks, run.width, dtype=torch.int32)
            shift = 0
            for one in run.slices:
                part = numbers[one.field][..., one.first : one.first + run.width]
                packed |= ((part >> one.low) & (2**one.bits - 1)) << shift
                shift += one.bits
            parts.append(packed.to(torch.uint8))
        return torch.cat(parts, dim=-1).reshape(rows, -1)

    def decode(self, data: Tensor) -> dict[str, Tensor]:
        """The inverse of `encode`: the fields of `data`, uint8 `[rows, bytes]`. Raises InputError for a part of a block."""
        rows, width = data.shape
        if width % self.block_bytes:
            raise InputError(f"{width} bytes a row are no whole blocks of {self.name}, which have {self.block_bytes} bytes")
        blocks = data.reshape(rows, -1, self.block_bytes).to(torch.int32)
        found = {name: torch.zeros(rows, blocks.shape[1], count, dtype=torch.int32) for name, (count, _) in self.fields.items()}
        start = 0
        for run in self.runs:
            part, shift = blocks[..., start : start + run.width], 0
            for one in run.slices:
                found[one.field][..., one.first : one.first + run.width] |= ((part >> shift) & (2**one.bits - 1)) << one.low
                shift += one.bits
            start += run.width
        return {name: self._values(name, numbers) for name, numbers in found.items()}

    def _numbers(self, name: str, values: Tensor, blocks: tuple[int, int]) -> Tensor:
        """int32 `[rows, blocks, numbers]` as the file has them."""
        count, bits = self.fields[name]
        if tuple(values.shape) != (blocks[0], blocks[1] * count):
            raise InputError(f"{name} {list(values.shape)} do not fit {self.name}; {[blocks[0], blocks[1] * count]} would")
        whole = values.view(torch.int16).to(torch.int32) & 0xFFFF if bits == 16 else values.to(torch.int32)
        if bool((whole >> bits).any()):
            raise InputError(f"a number of the {name} of {self.name} does not fit in {bits} bits")
        return (whole ^ self._flip(name)).reshape(*blocks, count)

    def _values(self, name: str, numbers: Tensor) -> Tensor:
        whole = (numbers ^ self._flip(name)).flatten(1)
        return whole.to(torch.int16).view(torch.float16) if self.fields[name][1] == 16 else whole.to(torch.uint8)

    def _flip(self, name: str) -> int:
        """Two's complement differs from counting from half the range in the highest bit alone."""
        return 2 ** (self.fields[name][1] - 1) if name in self.signed else 0


def _planes(field: str, count: int, stride: int, bits: int, low: int = 0) -> tuple[Run, ...]:
    """Numbers that lie `stride` apart in one byte: as many as fit, then the next ones."""
    together = 8 // bits
    span = together * stride
    return tuple(
        Run(stride, tuple(Slice(field, start + k * stride, low, bits) for k in range(together))) for start in range(0, count, span)
    )


def _half(field: str) -> tuple[Run, ...]:
    """One fp16 number, its low byte first."""
    return tuple(Run(1, (Slice(field, 0, low, 8),)) for low in (0, 8))


_SIX_BITS = (  # eight scales and eight minimums of six bits in twelve bytes
    Run(4, (Slice("scales", 0, 0, 6), Slice("scales", 4, 4, 2))),
    Run(4, (Slice("minimums", 0, 0, 6), Slice("minimums", 4, 4, 2))),
    Run(4, (Slice("scales", 4, 0, 4), Slice("minimums", 4, 0, 4))),
)
_SCALE, _MINIMUM = _half("scales"), _half("minimums")
_SUPER_SCALE, _SUPER_MINIMUM = _half("super_scales"), _half("super_minimums")
_FOUR_OF_32, _FIFTH_OF_32 = _planes("codes", 32, 16, 4), _planes("codes", 32, 1, 1, low=4)
_TWO, _FOUR, _FIFTH = _planes("codes", 256, 32, 2), _planes("codes", 256, 32, 4), _planes("codes", 256, 32, 1, low=4)
_Q3_SCALES = _planes("scales", 16, 8, 4) + _planes("scales", 16, 4, 2, low=4)
_Q6_CODES = _planes("codes", 256, 64, 4) + _planes("codes", 256, 32, 2, low=4)

_RUNS: dict[str, tuple[int, tuple[Run, ...]]] = {
    "q4_0": (2, _SCALE + _FOUR_OF_32),
    "q4_1": (3, _SCALE + _MINIMUM + _FOUR_OF_32),
    "q5_0": (6, _SCALE + _FIFTH_OF_32 + _FOUR_OF_32),
    "q5_1": (7, _SCALE + _MINIMUM + _FIFTH_OF_32 + _FOUR_OF_32),
    "q8_0": (8, _SCALE + _planes("codes", 32, 32, 8)),
    "q2_k": (10, (Run(16, (Slice("scales", 0, 0, 4), Slice("minimums", 0, 0, 4))), *_TWO, *_SUPER_SCALE, *_SUPER_MINIMUM)),
    "q3_k": (11, _planes("codes", 256, 32, 1, low=2) + _TWO + _Q3_SCALES + _SUPER_SCALE),
    "q4_k": (12, _SUPER_SCALE + _SUPER_MINIMUM + _SIX_BITS + _FOUR),
    "q5_k": (13, _SUPER_SCALE + _SUPER_MINIMUM + _SIX_BITS + _FIFTH + _FOUR),
    "q6_k": (14, _Q6_CODES + _planes("scales", 16, 16, 8) + _SUPER_SCALE),
}
_SIGNED = {"q8_0": ("codes",), "q6_k": ("scales",)}

TYPES = {name: BlockType(name, number, GRIDS[name], runs, _SIGNED.get(name, ())) for name, (number, runs) in _RUNS.items()}
