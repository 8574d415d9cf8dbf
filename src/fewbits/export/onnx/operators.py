"""How the two operators that multiply with few bits hold a grid: com.microsoft's MatMulNBits, and ONNX's own DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.export.grids import Grid
from fewbits.formats.packing import pack, packed_width, unpack

_BLOCKS = (256, 128, 64, 32, 16)  # columns that share a scale in MatMulNBits


@dataclass(frozen=True, eq=False)
class NBits:
    """What MatMulNBits reads, `[N rows, K columns]` in blocks of columns: value = (code - zero point) * scale.

    `blob` uint8 [N, blocks, block * bits / 8] and `zero_points` uint8 [N, ceil(blocks * bits / 8)] from the lowest bit on; codes
    behind the last column are zero points. Without zero points each is 2**(bits-1); real ones, float32 [N, blocks], are for codes of 2
    and 4 bits. `scales` float32 [N, blocks]. Source: the operator's description in onnxruntime's ContribOperators.md.
    """

    blob: Tensor
    scales: Tensor
    zero_points: Tensor | None
    columns: int
    bits: int

    @property
    def block(self) -> int:
        return self.blob.shape[2] * 8 // self.bits

    @classmethod
    def of(cls, grid: Grid, real_zeros: Tensor | None = None) -> NBits | str:
        """`grid`, which is in the inputs' order, number for number; or why it does not fit.

        `real_zeros [rows, groups]` are in the place of its zero points.
        """
        if grid.bits not in (2, 4, 8):
            return f"its codes have {grid.bits} bits, where MatMulNBits has 2, 4 and 8"
        if grid.bits == 8 and real_zeros is not None:
            return "its zero points are no whole numbers, which MatMulNBits has beside codes of 2 and 4 bits alone"
        rows, columns = grid.codes.shape
        block = _block(grid)
        if block is None:
            return f"its groups of {grid.group_size} inputs are no multiple of 16, of which MatMulNBits makes its blocks"
        group = torch.arange(0, columns, block) // grid.group_size
        zeros = grid.zero_points[:, group]
        missing = len(group) * block - columns
        codes = torch.cat([grid.codes, zeros[:, -1:].expand(-1, missing)], dim=1)
        blob = pack(codes, grid.bits).view(rows, len(group), block * grid.bits // 8)
        packed = None if grid.symmetric else pack(zeros, grid.bits)
        packed = packed if real_zeros is None else real_zeros.float()[:, group]
        return cls(blob, grid.scales.float()[:, group], packed, columns, grid.bits)

    def grid(self) -> Grid:
        """The inverse of `of`, in groups of a block, real zero points left out. Raises InputError where shapes disagree."""
        rows, blocks = self.blob.shape[:2]
        if self.scales.numel() != rows * blocks or blocks != -(-self.columns // self.block):
            raise InputError(
                f"{self.scales.numel()} scales and blobs {list(self.blob.shape)} do not fit {rows} rows of {self.columns} codes"
            )
        codes = unpack(self.blob.flatten(1), self.bits, blocks * self.block)[:, : self.columns]
        whole = self.zero_points is not None and not self.zero_points.is_floating_point()
        if self.zero_points is not None and whole:
            zeros = unpack(self.zero_points.view(rows, -1), self.bits, blocks)
        else:
            zeros = torch.full((rows, blocks), 2 ** (self.bits - 1), dtype=torch.uint8)
        size = min(self.block, self.columns)
        return Grid(codes.contiguous(), self.scales.view(rows, blocks), zeros, not whole, self.bits, size)


@dataclass(frozen=True, eq=False)
class Quantized:
    """What DequantizeLinear reads, of the matrix `[K columns, N rows]` that inputs are multiplied with.

    `codes` are `[K, N]` in 8 bits, and in 4 bits two a byte, uint8 [ceil(K * N / 2)], the first in the low half; signed, and no zero
    points, where the grid is symmetric. `scales` float32 and `zero_points`, as the codes, are [N] for whole rows, else [groups, N].
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    shape: tuple[int, int]
    bits: int
    group_size: int | None

    @classmethod
    def of(cls, grid: Grid) -> Quantized | str:
        """`grid`, which is in the inputs' order, number for number; or why it does not fit."""
        if grid.bits not in (4, 8):
            return f"its codes have {grid.bits} bits, where DequantizeLinear has 4 and 8"
        columns, rows = grid.codes.shape[1], grid.codes.shape[0]
        scales, zeros = grid.scales.float().T.contiguous(), grid.zero_points.T.contiguous()
        if grid.whole_rows:
            scales, zeros = scales[0], zeros[0]
        codes = _halves(_signed(grid.codes.T, grid.bits, grid.symmetric), grid.bits)
        wide = None if grid.symmetric else _halves(zeros, grid.bits)
        return cls(codes, scales, wide, (columns, rows), grid.bits, None if grid.whole_rows else grid.group_size)

    def grid(self) -> Grid:
        """The inverse of `of`. Raises InputError where shapes disagree."""
        columns, rows = self.shape
        size = columns if self.group_size is None else self.group_size
        groups = -(-columns // size)
        if self.scales.numel() != rows * groups:
            raise InputError(f"{self.scales.numel()} scales do not fit {rows} rows of {groups} groups")
        symmetric = self.zero_points is None
        codes = _signed(_whole(self.codes, self.bits, (columns, rows)), self.bits, symmetric).T.contiguous()
        if self.zero_points is None:
            zeros = torch.full((rows, groups), 2 ** (self.bits - 1), dtype=torch.uint8)
        else:
            zeros = _whole(self.zero_points, self.bits, (groups, rows)).T.contiguous()
        return Grid(codes, self.scales.view(groups, rows).T.contiguous(), zeros, symmetric, self.bits, size)


def _block(grid: Grid) -> int | None:
    """The largest block that lies in one group; whole rows are cut into blocks, and a short one is filled up."""
    if grid.whole_rows:
        columns = grid.codes.shape[1]
        return next((block for block in reversed(_BLOCKS) if block >= columns), _BLOCKS[0])
    return next((block for block in _BLOCKS if grid.group_size % block == 0), None)


def _signed(codes: Tensor, bits: int, signed: bool) -> Tensor:
    """Counted from half the range or, its own inverse, from zero: in two's complement that is the highest bit alone."""
    return codes ^ 2 ** (bits - 1) if signed else codes


def _halves(values: Tensor, bits: int) -> Tensor:
    return values.contiguous() if bits == 8 else pack(values.reshape(1, -1), bits)[0]


def _whole(held: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """uint8 of `shape`. Raises InputError for another number of codes."""
    numbers = shape[0] * shape[1]
    if held.numel() != packed_width(numbers, bits):
        raise InputError(f"{held.numel()} bytes cannot hold {numbers} codes of {bits} bits; {packed_width(numbers, bits)} would")
    return unpack(held.reshape(1, -1), bits, numbers).view(shape)
