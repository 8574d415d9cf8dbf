"""Inputs of a linear layer in blocks of features, of which some have more bits than the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Part
from fewbits.formats.packing import pack, unpack

_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of fp16


@dataclass(frozen=True, eq=False)
class BlockQuantizer(Part, kind="block_quantizer"):
    """Symmetric rounding to -(2**(bits-1) - 1) .. 2**(bits-1) - 1, `wide` says which blocks have `wide_bits`. Made by `from_blocks`.

    Each token has an fp16 scale for every block, from its own largest magnitude; or, with `scales` (fp16 `[blocks]`), there is one
    a block, once and for all, and what is larger is cut off. The last block may be shorter.
    """

    wide: Tensor  # uint8 [bytes]: one bit a block
    features: int
    block_size: int
    narrow_bits: int = 4
    wide_bits: int = 8
    scales: Tensor | None = None

    @classmethod
    def from_blocks(
        cls, wide: Tensor, features: int, block_size: int, *, bits: tuple[int, int] = (4, 8), largest: Tensor | None = None
    ) -> BlockQuantizer:
        """`wide [blocks]` bool; `bits` of other blocks and of wide ones; `largest [features]`: magnitudes that fixed scales reach.

        Raises InputError for bits outside 2 to 8, where blocks do not fit the features, or a magnitude is not finite.
        """
        if block_size < 1 or wide.shape != (-(-features // block_size),):
            raise InputError(f"{list(wide.shape)} blocks of {block_size} do not fit {features} features")
        if not 2 <= bits[0] <= bits[1] <= 8:
            raise InputError(f"blocks of {bits[0]} and {bits[1]} bits are out of range; 2 to 8, the wide ones no fewer, would be right")
        made = cls(pack(wide.to(torch.uint8)[None], 1)[0], features, block_size, *bits)
        if largest is None:
            return made
        if not bool(torch.isfinite(largest).all()):
            raise InputError("the largest input is not finite; calibration tokens would be right")
        scales = _scales(made._blocks(largest).abs().amax(-1) / made._most())
        return cls(made.wide, features, block_size, *bits, scales.half())

    def is_wide(self) -> Tensor:
        """bool `[blocks]`."""
        return unpack(self.wide[None], 1, -(-self.features // self.block_size))[0].bool()

    def wide_share(self) -> float:
        """Of the features, those in wide blocks."""
        return int(self.is_wide().repeat_interleave(self.block_size)[: self.features].sum()) / self.features

    def codes(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """int8 of the shape of `inputs [..., features]`, and scales, float32 that fp16 holds, `[..., blocks]`."""
        codes, scales = self._rounded(inputs)
        return codes.flatten(-2)[..., : self.features].to(torch.int8), scales

    def apply(self, inputs: Tensor) -> Tensor:
        """`inputs [..., features]` rounded, in the same dtype."""
        codes, scales = self._rounded(inputs)
        return (codes * scales[..., None]).flatten(-2)[..., : self.features].to(inputs.dtype)

    def _rounded(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Whole numbers as float32 `[..., blocks, block_size]`, zero behind the last feature, and scales `[..., blocks]`."""
        blocks, most = self._blocks(inputs), self._most()
        fixed = None if self.scales is None else self.scales.float().expand(blocks.shape[:-1])
        scales = _scales(blocks.abs().amax(-1) / most) if fixed is None else fixed
        codes = (blocks / scales[..., None]).round()
        return torch.minimum(torch.maximum(codes, -most[:, None]), most[:, None]), scales

    def _blocks(self, inputs: Tensor) -> Tensor:
        short = -self.features % self.block_size
        return torch.nn.functional.pad(inputs.float(), (0, short)).unflatten(-1, (-1, self.block_size))

    def _most(self) -> Tensor:
        """The largest code of every block, float32 `[blocks]`."""
        wide, narrow = (float(2 ** (bits - 1) - 1) for bits in (self.wide_bits, self.narrow_bits))
        return torch.where(self.is_wide(), wide, narrow)


def _scales(values: Tensor) -> Tensor:
    """What fp16 keeps of them, in float32."""
    return values.clamp(_SMALLEST, _LARGEST).half().float()
