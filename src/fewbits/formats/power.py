"""Levels spaced by a power function: dense near zero, wide at the ends.

Source: PowerQuant (arXiv 2301.09858) and NUPES (arXiv 2308.05600): x -> sign(x) |x|**a before uniform rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.formats.coded import Coded
from fewbits.formats.packing import pack, unpack
from fewbits.kernels.layout import ABSENT, Description, coded, dense


@dataclass(frozen=True, eq=False)
class Power(Coded, kind="power"):
    """value = M * sign(q) * (|q| / L)**(1/a), with codes q from -L to L = 2**(bits-1) - 1, a row's largest magnitude M, and a.

    Codes are packed as q + L, `[rows, bytes]`; maxima are fp16 `[rows, 1]`; the exponent a is float32 `[1]`. The exponent 1
    is the symmetric uniform grid of scale M / L. Made by `from_codes` or `nearest`.
    """

    codes: Tensor
    maxima: Tensor
    exponent: Tensor
    columns: int
    bits_per_code: int

    @classmethod
    def from_codes(cls, codes: Tensor, maxima: Tensor, exponent: Tensor | float, *, bits: int) -> Power:
        """`codes [rows, columns]` from -L to L, `maxima [rows, 1]` in the dtype to store.

        Raises InputError for bits outside 2 to 8, an exponent that is not above zero, a code out of range, or maxima that
        do not fit or are not finite.
        """
        most = largest_code(bits)
        stored = torch.as_tensor(exponent, dtype=torch.float32, device=codes.device).detach().reshape(1).clone()
        if not 0 < float(stored) < float("inf"):
            raise InputError(f"exponent={float(stored)} is out of range; a positive number such as 0.5 would be right")
        if maxima.shape != (codes.shape[0], 1):
            raise InputError(f"maxima {list(maxima.shape)} do not fit codes {list(codes.shape)}; [{codes.shape[0]}, 1] would")
        if not bool(torch.isfinite(maxima).all()):
            raise InputError(f"a row's maximum is not finite in {maxima.dtype}; a wider dtype, or finite weights, would be right")
        if codes.numel() and int(codes.abs().max()) > most:
            raise InputError(f"a code of {int(codes.abs().max())} is out of range; -{most} to {most} fit in {bits} bits")
        return cls(pack((codes + most).to(torch.uint8), bits), maxima, stored, codes.shape[1], bits)

    @classmethod
    def nearest(cls, weight: Tensor, exponent: Tensor | float, *, bits: int) -> Power:
        """`weight [rows, columns]` rounded after the power function; each row's largest magnitude is its maximum, in fp16.

        NUPES's operator: rounding to the nearest code of the bent value, not to the nearest level.
        """
        maxima = weight.abs().amax(1, keepdim=True).half()
        kept = torch.as_tensor(exponent, dtype=torch.float32, device=weight.device).detach().reshape(1)
        return cls.from_codes(power_codes(weight, maxima.float(), kept, bits).to(torch.int16), maxima, kept, bits=bits)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.columns

    def unpacked_codes(self) -> Tensor:
        """int16 `[rows, columns]`, from -L to L."""
        return unpack(self.codes, self.bits_per_code, self.columns).to(torch.int16) - largest_code(self.bits_per_code)

    def levels(self) -> Tensor:
        """float32 `[2L + 1]`, ascending from -L to L: what a row's values are, in units of M / L. One table serves all rows."""
        most = largest_code(self.bits_per_code)
        codes = torch.arange(-most, most + 1, device=self.codes.device)
        # In float64: with an exponent of 1 every level is then its code exactly.
        return (most * power_map(codes.double() / most, 1 / self.exponent.double())).float()

    def described(self) -> Description | None:
        levels, scales = dense(torch.nn.functional.pad(self.levels(), (0, 1))[None]), dense(self._scales())  # a code is never the last one
        if levels is None or scales is None or not self.columns:
            return None
        return coded((*self.shape, self.bits_per_code, self.columns), self.codes, levels, scales, ABSENT)

    def define(self, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = unpack(self.codes, self.bits_per_code, self.columns).long()
        return (self.levels()[codes] * self._scales()).to(dtype)

    def _scales(self) -> Tensor:
        """float32 `[rows, 1]`: what a row's levels are in units of."""
        return self.maxima.float() / largest_code(self.bits_per_code)


def largest_code(bits: int) -> int:
    """L = 2**(bits-1) - 1. Raises InputError for bits outside 2 to 8."""
    if not 2 <= bits <= 8:
        raise InputError(f"bits={bits} is out of range; 2 to 8 would be right")
    return int(2 ** (bits - 1)) - 1


def power_map(values: Tensor, exponent: Tensor | float) -> Tensor:
    """sign(x) |x|**a: of products it makes products of the maps, f(xy) = f(x) f(y) (NUPES, section 3)."""
    return values.sign() * values.abs().pow(exponent)


def power_codes(weight: Tensor, maxima: Tensor, exponent: Tensor | float, bits: int) -> Tensor:
    """round(L * f(w / M)) within -L to L, as floats `[rows, columns]`; `maxima [rows, 1]`. Rows whose maximum is 0 get 0."""
    most = largest_code(bits)
    safe = torch.where(maxima == 0, 1.0, maxima)
    codes = torch.round(most * power_map(weight / safe, exponent)).clamp(-most, most)
    return torch.where(maxima == 0, 0.0, codes)
