"""Dense packing of small unsigned integers: a little-endian bit stream for each row, so that rows can be read alone."""

import math

import torch
from torch import Tensor

from fewbits.core.errors import InputError

_CHUNK = 2**19  # codes that are spread out, up to eight bytes each, at a time; of those above 8 bits so many bits


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
    pack_rows, size = (_pack_rows, columns) if bits < 8 else (_pack_wide_rows, columns * bits)
    step = max(1, _CHUNK // max(1, size))
    return torch.cat([pack_rows(part, bits) for part in codes.split(step)]) if rows > step else pack_rows(codes, bits)


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """As `_unpack_rows`, the other way: `count` codes are shifted into one number, which is cut into bytes."""
    taken, count, words_in = _runs(bits)
    rows, columns = codes.shape
    runs = torch.nn.functional.pad(codes, (0, -columns % count)).view(rows, -(-columns // count), count)
    words = runs[..., 0].to(words_in, copy=True)
    for place in range(1, count):
        words |= runs[..., place].to(words_in) << (place * bits)
    stream = words if taken == 1 else torch.stack([words >> (8 * byte) & 255 for byte in range(taken)], dim=-1).to(torch.uint8)
    return stream.reshape(rows, runs.shape[1] * taken)[:, : packed_width(columns, bits)].contiguous()


def _pack_wide_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes of more than a byte, bit by bit."""
    rows, columns = codes.shape
    shifts = torch.arange(bits, device=codes.device, dtype=torch.int32)
    stream = ((codes.to(torch.int32)[:, :, None] >> shifts) & 1).to(torch.uint8).reshape(rows, columns * bits)
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
    taken, count, words_in = _runs(bits)
    rows, width = packed.shape
    runs = torch.nn.functional.pad(packed, (0, -width % taken)).view(rows, -(-width // taken), taken)
    words = runs[..., 0].to(words_in)
    for byte in range(1, taken):
        words = words | (runs[..., byte].to(words.dtype) << (8 * byte))
    shifts = torch.arange(count, device=packed.device, dtype=words.dtype) * bits
    codes = (words[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(1)[:, :columns].to(torch.uint8)


def _runs(bits: int) -> tuple[int, int, torch.dtype]:
    """How many bytes hold how many whole codes, and a dtype of so many bytes."""
    shared = math.gcd(bits, 8)
    taken = bits // shared
    return taken, 8 // shared, torch.uint8 if taken == 1 else torch.int32 if taken <= 3 else torch.int64


def _check_width(bits: int) -> None:
    if not 1 <= bits <= 24:
        raise InputError(f"bits={bits} is out of range; codes of 1 to 24 bits can be packed")
