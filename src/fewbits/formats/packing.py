"""Dense packing of small unsigned integers: a little-endian bit stream for each row, so that rows can be read alone."""

import math

import torch
from torch import Tensor

from fewbits.core.errors import InputError

_CHUNK = 2**19  # bits that are spread out, up to eight bytes each, at a time


def packed_width(columns: int, bits: int) -> int:
    """Bytes that a row of `columns` codes takes: at most 7 bits of a row are padding."""
    return (columns * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """`codes [rows, columns]`, integers in 0..2**bits-1, to uint8 `[rows, packed_width]`.

    Bit k of a row's stream is bit k % 8 of byte k // 8. Raises InputError for a width outside 1..24 or a code out of range.
    """
    _check_width(bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise InputError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit in {bits} bits (0 to {2**bits - 1})")
    rows, columns = codes.shape
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    step = max(1, _CHUNK // max(1, columns * bits))
    return torch.cat([_pack_rows(part, bits) for part in codes.split(step)]) if rows > step else _pack_rows(codes, bits)


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    narrow = torch.uint8 if bits <= 8 else torch.int32
    shifts = torch.arange(bits, device=codes.device, dtype=narrow)
    stream = ((codes.to(narrow)[:, :, None] >> shifts) & 1).to(torch.uint8).reshape(rows, columns * bits)
    width = packed_width(columns, bits)
    stream = torch.nn.functional.pad(stream, (0, width * 8 - columns * bits)).reshape(rows, width, 8)
    return (stream << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: codes `[rows, columns]`, uint8 up to 8 bits and int32 above."""
    _check_width(bits)
    width = packed.shape[1]
    if width != packed_width(columns, bits):
        raise InputError(f"rows of {width} bytes cannot hold {columns} codes of {bits} bits; {packed_width(columns, bits)} would")
    if bits == 8:
        return packed
    if bits > 8:  # a code spans at most four neighbouring bytes
        starts = torch.arange(columns, device=packed.device) * bits
        wide = torch.nn.functional.pad(packed, (0, 3)).long()
        words = sum((wide[:, starts // 8 + byte] << (8 * byte) for byte in range(1, 4)), wide[:, starts // 8])
        return ((words >> (starts % 8)) & (2**bits - 1)).to(torch.int32)
    step = max(1, _CHUNK // max(1, columns))
    return (
        torch.cat([_unpack_rows(part, bits, columns) for part in packed.split(step)])
        if len(packed) > step
        else _unpack_rows(packed, bits, columns)
    )


def _unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Bytes and codes meet again after `count` codes, such as 8 codes of 3 bits: each such run is one number, shifted out."""
    shared = math.gcd(bits, 8)
    taken, count = bits // shared, 8 // shared
    rows, width = packed.shape
    runs = torch.nn.functional.pad(packed, (0, -width % taken)).view(rows, -(-width // taken), taken)
    words = runs[..., 0] if taken == 1 else runs[..., 0].to(torch.int32 if taken <= 3 else torch.int64)
    for byte in range(1, taken):
        words = words | (runs[..., byte].to(words.dtype) << (8 * byte))
    shifts = torch.arange(count, device=packed.device, dtype=words.dtype) * bits
    codes = (words[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(1)[:, :columns].to(torch.uint8)


def _check_width(bits: int) -> None:
    if not 1 <= bits <= 24:
        raise InputError(f"bits={bits} is out of range; codes of 1 to 24 bits can be packed")
