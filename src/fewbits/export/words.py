"""Codes in 32-bit words: a little-endian bit stream along a row, as compressed-tensors and GPTQ files hold it."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.formats.packing import pack, packed_width, unpack


def to_words(codes: Tensor, bits: int) -> Tensor:
    """`codes [rows, columns]` below 2**bits to int32 `[rows, ceil(columns * bits / 32)]`; zeros pad the last word."""
    packed = pack(codes, bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    # Flat first: the stride of an axis of length one may be any, and a view in wider numbers wants it a multiple.
    return padded.flatten().view(torch.int32).view(len(codes), -1)


def from_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `to_words`: uint8 `[rows, columns]`. Raises InputError where the words are too many or too few."""
    if words.shape[1] != -(-columns * bits // 32):
        raise InputError(f"rows of {words.shape[1]} words cannot hold {columns} codes of {bits} bits; {-(-columns * bits // 32)} would")
    stream = words.flatten().view(torch.uint8).view(len(words), -1)
    return unpack(stream[:, : packed_width(columns, bits)].contiguous(), bits, columns)


def from_padded_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """uint8 `[rows, columns]` from words that hold 32 // bits codes each, and spare bits at their top where 32 is no multiple."""
    each = 32 // bits
    if words.shape[1] != -(-columns // each):
        raise InputError(f"rows of {words.shape[1]} words cannot hold {columns} codes of {bits} bits; {-(-columns // each)} would")
    codes = (words[..., None] >> (torch.arange(each, dtype=torch.int32) * bits)) & (2**bits - 1)
    return codes.flatten(1)[:, :columns].to(torch.uint8)
