"""Small floating-point numbers of any exponent and mantissa width, in blocks that share a scale (MX, NVFP4, FP8)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.formats.coded import Coded, taken_rows
from fewbits.formats.packing import pack, unpack
from fewbits.kernels.layout import ABSENT, Description, coded, dense, table

Specials = Literal["none", "nan", "ieee"]
ScaleFormat = Literal["float", "e8m0", "e4m3"]


@dataclass(frozen=True)
class Layout:
    """Bits of a number: a sign, then exponent, then mantissa; bias 2**(exponent_bits - 1) - 1 and subnormals, as in IEEE 754.

    `specials`: "none", every code is a number (FP4, FP6); "nan", all ones is NaN and the rest are numbers (E4M3);
    "ieee", the largest exponent holds the infinities and NaN (E5M2).
    """

    exponent_bits: int
    mantissa_bits: int
    specials: Specials = "none"

    def __post_init__(self) -> None:
        if self.exponent_bits < 1 or self.mantissa_bits < 0 or self.bits > 8:
            raise InputError(
                f"E{self.exponent_bits}M{self.mantissa_bits} does not fit; an exponent of 1 or more bits, 8 bits in all, would"
            )
        if self.specials not in get_args(Specials):
            raise InputError(f"specials={self.specials!r} is not known; 'none', 'nan' or 'ieee' would be right")
        if len(_magnitudes(self)) < 2:
            raise InputError(f"E{self.exponent_bits}M{self.mantissa_bits} with {self.specials!r} has no number but zero; more bits would")

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return float(_magnitudes(self)[-1])

    def values(self) -> Tensor:
        """float32 `[2**bits]`: the value of every code, infinities and NaN included."""
        finite = _magnitudes(self)
        magnitudes = torch.full((2 ** (self.bits - 1),), torch.nan, dtype=torch.float64)
        magnitudes[: len(finite)] = finite
        if self.specials == "ieee":
            magnitudes[len(finite)] = torch.inf
        return torch.cat([magnitudes, -magnitudes]).float()

    def encode(self, values: Tensor) -> Tensor:
        """uint8 codes of the nearest numbers; ties go to the even mantissa, what is too large to the largest finite value.

        Raises InputError for values that are not finite.
        """
        if not bool(torch.isfinite(values).all()):
            raise InputError("a value is not finite and cannot be rounded")
        magnitudes = _magnitudes(self).to(values.device)
        wanted = values.abs().double()
        low = (torch.searchsorted(magnitudes, wanted, right=True) - 1).clamp(max=len(magnitudes) - 2)
        below, above = wanted - magnitudes[low], magnitudes[low + 1] - wanted
        up = (above < below) | ((above == below) & (low % 2 == 1))
        sign = torch.signbit(values).to(torch.int64) << (self.bits - 1)
        return ((low + up.to(torch.int64)) | sign).to(torch.uint8)


@cache
def _magnitudes(layout: Layout) -> Tensor:
    """float64: finite magnitudes of the codes 0, 1, 2, ..., which ascend."""
    steps, bias = 2**layout.mantissa_bits, 2 ** (layout.exponent_bits - 1) - 1
    exponents = 2**layout.exponent_bits - (layout.specials == "ieee")
    exponent = torch.arange(exponents, dtype=torch.float64)[:, None]
    fraction = torch.arange(steps, dtype=torch.float64) / steps
    normal = (1 + fraction) * torch.exp2(exponent - bias)
    found = torch.where(exponent > 0, normal, fraction * 2.0 ** (1 - bias)).flatten()
    return found[:-1] if layout.specials == "nan" else found


E4M3 = Layout(4, 3, "nan")
E5M2 = Layout(5, 2, "ieee")
E2M1 = Layout(2, 1)


@dataclass(frozen=True, eq=False)
class Minifloat(Coded, kind="minifloat"):
    """value = number(code) * scale of its block * tensor_scale.

    Packed codes `[rows, bytes]`; scales `[rows or 1, blocks]`, floating point, or uint8 that are powers of two (e8m0: 2**(code - 127))
    or E4M3 numbers; `tensor_scale [1]` float32 or None. Made by `round_to_nearest`.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    rows: int
    columns: int
    exponent_bits: int
    mantissa_bits: int
    specials: str
    block_size: int
    scale_format: str

    @classmethod
    def round_to_nearest(
        cls, weight: Tensor, layout: Layout, *, block_size: int | None = None, scale_format: ScaleFormat = "float"
    ) -> Minifloat:
        """`weight [rows, columns]` rounded in blocks of columns (None: whole rows) whose largest entry decides the scale.

        "e8m0" is the rule of the OCP MX specification 1.0 (section 6.3: the power of two below the largest entry, over that of
        the largest number; what lies above saturates); "e4m3" is NVFP4's with one float32 scale for the tensor; "float"
        are fp16 scales that bring the largest entry to the largest number. Raises InputError for values that are not finite.
        """
        rows, columns = weight.shape
        size = columns if block_size is None else block_size
        if size < 1:
            raise InputError(f"block_size={size} is out of range; it must be at least 1, or None for whole rows")
        largest = torch.cat([block.abs().amax(1, keepdim=True) for block in weight.float().split(size, dim=1)], dim=1)
        if not bool(torch.isfinite(largest).all()):
            raise InputError("a weight is not finite and cannot be rounded")
        scales, tensor_scale = _fit_scales(largest, layout, scale_format)
        wide = _scale_values(scales, tensor_scale, scale_format)
        # A block whose scale rounds to zero holds nothing that can be told from zero.
        wide = torch.where(wide == 0, torch.inf, wide).repeat_interleave(size, dim=1)[:, :columns]
        codes = pack(layout.encode(weight.float() / wide), layout.bits)
        numbers = (layout.exponent_bits, layout.mantissa_bits, layout.specials, size, scale_format)
        return cls(codes, scales, tensor_scale, rows, columns, *numbers)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def layout(self) -> Layout:
        return Layout(self.exponent_bits, self.mantissa_bits, self.specials)  # type: ignore[arg-type]

    def described(self) -> Description | None:
        if self.scale_format == "float":
            scales = None if self.tensor_scale is not None else dense(self.scales)
        else:
            scales = table(self.scales, self._scales_of_codes)
        if scales is None:
            return None
        levels = dense(self._levels)
        return (
            None
            if levels is None
            else coded((self.rows, self.columns, self.layout.bits, self.block_size), self.codes, levels, scales, ABSENT)
        )

    @cached_property
    def _levels(self) -> Tensor:
        """float32 `[1, 2**bits]`, made once, as kernels that keep what they saw ask for."""
        return self.layout.values()[None].to(self.codes.device)

    @cached_property
    def _scales_of_codes(self) -> Tensor:
        """float32 `[256]`, made once."""
        return _scale_values(torch.arange(256, dtype=torch.uint8, device=self.scales.device), self.tensor_scale, self.scale_format)

    def define(self, dtype: torch.dtype = torch.float32) -> Tensor:
        numbers = self.layout.values().to(self.codes.device)[unpack(self.codes, self.layout.bits, self.columns).long()]
        scales = _scale_values(self.scales, self.tensor_scale, self.scale_format)
        return (numbers * scales.repeat_interleave(self.block_size, dim=1)[:, : self.columns]).to(dtype)

    def taken(self, rows: Tensor) -> Minifloat:
        scales = cast(Tensor, taken_rows(self.scales, rows))
        return replace(self, codes=self.codes.index_select(0, rows), scales=scales, rows=len(rows))


def _fit_scales(largest: Tensor, layout: Layout, scale_format: str) -> tuple[Tensor, Tensor | None]:
    if scale_format == "e8m0":
        highest = torch.floor(torch.log2(torch.tensor(layout.largest)))
        exponent = torch.floor(torch.log2(largest.clamp(min=2.0**-126))) - highest
        return (exponent + 127).clamp(0, 254).to(torch.uint8), None
    if scale_format == "e4m3":
        tensor_scale = (largest.max() / (layout.largest * E4M3.largest)).clamp(min=torch.finfo(torch.float32).tiny).reshape(1)
        return E4M3.encode(largest / layout.largest / tensor_scale), tensor_scale
    if scale_format != "float":
        raise InputError(f"scale_format={scale_format!r} is not known; 'float', 'e8m0' or 'e4m3' would be right")
    scales = torch.where(largest == 0, 1.0, largest / layout.largest).half()
    if not bool(torch.isfinite(scales).all()):
        raise InputError("a scale does not fit in fp16; scale_format='e8m0' would be right")
    return scales, None


def _scale_values(scales: Tensor, tensor_scale: Tensor | None, scale_format: str) -> Tensor:
    if scale_format == "e8m0":
        return torch.exp2(scales.float() - 127)
    values = E4M3.values().to(scales.device)[scales.long()] if scale_format == "e4m3" else scales.float()
    return values if tensor_scale is None else values * tensor_scale
