"""SpQR's tiles of 16 x 16 weights: a word for every 16 codes in a row. Both directions.

Of 64 bits, from the lowest: 3 of the row's scale, 3 of its zero point, 16 codes of 3, a byte of the tile's statistics, 2 spare.
The four fp16 statistics of a tile lie in the bytes of its rows, each byte in two neighbouring rows.
Source: the layout of the package spqr_quant, 0.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError

SIDE, BITS = 16, 3
_STATISTICS_AT = BITS * (SIDE + 2)


@dataclass(frozen=True, eq=False)
class Tiles:
    """weight = (code - zero) * scale, where scales and zeros are (code - zero_point) * scale of each tile.

    `codes [rows, columns]`; `scales` and `zeros` `[rows, columns / 16]`, codes too, all uint8 below 8. `statistics` fp16
    `[rows / 16, columns / 16, 4]`: scale of the scales, scale of the zeros, zero point of the scales, zero point of the zeros.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    statistics: Tensor

    def words(self) -> Tensor:
        """int64 `[rows * columns / 16]`: tile after tile of a row of tiles, 16 words each."""
        high, wide = self.statistics.shape[:2]
        fields = torch.cat([self.scales[..., None], self.zeros[..., None], self.codes.unflatten(1, (wide, SIDE))], 2)
        words = _shifted(fields.long(), BITS).unflatten(0, (high, SIDE)).transpose(1, 2)
        pieces = self.statistics.contiguous().view(torch.uint8).long().repeat_interleave(2, dim=2)
        return (words | pieces << _STATISTICS_AT).flatten()


def from_words(words: Tensor, rows: int, columns: int) -> Tiles:
    """The inverse of `Tiles.words`. Raises InputError where the words are too many or too few for the matrix."""
    if rows % SIDE or columns % SIDE or words.numel() * SIDE != rows * columns:
        raise InputError(f"{words.numel()} words do not make tiles of {rows} x {columns} weights; {rows * columns // SIDE} would")
    tiled = words.view(rows // SIDE, columns // SIDE, SIDE)
    pieces = (tiled >> _STATISTICS_AT & 0xFF).to(torch.uint8)
    statistics = (pieces[..., ::2] | pieces[..., 1::2]).contiguous().view(torch.float16)
    plain = tiled.transpose(1, 2).flatten(0, 1)
    fields = (plain[..., None] >> torch.arange(SIDE + 2) * BITS & 2**BITS - 1).to(torch.uint8)
    return Tiles(fields[..., 2:].flatten(1), fields[..., 0], fields[..., 1], statistics)


def _shifted(fields: Tensor, bits: int) -> Tensor:
    """Numbers of the last axis side by side in one, the first in the lowest bits."""
    return (fields << torch.arange(fields.shape[-1]) * bits).sum(-1)
