"""Vectors of neighbouring weights as short codewords times one decoder: value = C[code] D."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import Term
from fewbits.formats.additive import index_bits
from fewbits.formats.packing import pack, unpack


@dataclass(frozen=True, eq=False)
class DecodedCodes(Term, kind="decoded_codes"):
    """Packed codes `[rows, bytes]`, `codebook [entries, inner]`, `decoder [inner, unit]`.

    Each group of `unit` neighbouring columns of a row has one code. Where the columns end inside the last group, its values
    beyond them mean nothing. Made by `from_codes`.
    """

    codes: Tensor
    codebook: Tensor
    decoder: Tensor
    rows: int
    columns: int

    @classmethod
    def from_codes(cls, codes: Tensor, codebook: Tensor, decoder: Tensor, *, columns: int | None = None) -> DecodedCodes:
        """`codes [rows, groups]`, integers; codebook and decoder are stored in the dtype they come in.

        `columns` is groups * unit, or less by a part of the last group. Raises InputError where shapes disagree, a number is
        not finite, or a code does not fit.
        """
        (rows, groups), (entries, inner), unit = codes.shape, codebook.shape, decoder.shape[1]
        columns = groups * unit if columns is None else columns
        if decoder.shape[0] != inner or not (groups - 1) * unit < columns <= groups * unit:
            shapes = f"codes {list(codes.shape)}, codebook {list(codebook.shape)} and decoder {list(decoder.shape)}"
            raise InputError(f"{shapes} do not fit {columns} columns")
        if codes.numel() and int(codes.max()) >= entries:
            raise InputError(f"a code of {int(codes.max())} does not fit a codebook of {entries} entries")
        for name, values in (("codebook", codebook), ("decoder", decoder)):
            if not bool(torch.isfinite(values).all()):
                raise InputError(
                    f"a number of the {name} is not finite in {values.dtype}; a wider dtype, or finite weights, would be right"
                )
        return cls(pack(codes, index_bits(entries)), codebook, decoder, rows, columns)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def unpacked_codes(self) -> Tensor:
        """int64 `[rows, groups]`."""
        groups = -(-self.columns // self.decoder.shape[1])
        return unpack(self.codes, index_bits(len(self.codebook)), groups).long()

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        whole = self.codebook.float() @ self.decoder.float()
        return whole[self.unpacked_codes()].flatten(1)[:, : self.columns].to(dtype)

    def matmul(self, inputs: Tensor) -> Tensor:
        """Inputs are decoded once for all rows, to `inner` numbers a group: the product is by inner / unit smaller."""
        unit = self.decoder.shape[1]
        codes = self.unpacked_codes()
        padded = torch.nn.functional.pad(inputs, (0, codes.shape[1] * unit - self.columns))
        decoded = padded.unflatten(-1, (codes.shape[1], unit)) @ self.decoder.to(inputs.dtype).T
        return decoded.flatten(-2) @ self.codebook.to(inputs.dtype)[codes].flatten(1).T
