"""Attention of a few queries over keys and values that lie packed: a native kernel, and beside it the definition in plain torch.

Keys are packed channel by channel, so that a group is a run of tokens; values token by token, so that a group is a run of channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.kernels import native
from fewbits.kernels.dispatch import counts
from fewbits.kernels.layout import DENSE, NONE, Description

_PLAIN, _PACKED = 0, 1


@dataclass(frozen=True, eq=False)
class Segment:
    """Neighbouring tokens of one sequence's keys, or of its values.

    `plain()` are their numbers `[tokens, heads, width]`. `matrix` is how they lie packed, where the kernel reads them so: keys
    `[heads * width, tokens]`, values `[tokens, heads * width]`, head after head.
    """

    tokens: int
    plain: Callable[[], Tensor]
    matrix: Description | None = None


Side = Sequence[Sequence[Segment]]  # of each sequence, all its tokens in order


def serves(matrix: Description | None) -> bool:
    """Whether the kernel reads keys or values that lie so: on uniform grids of each row's own, in groups of whole lanes."""
    if matrix is None or not all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in matrix.tensors):
        return False
    rows, columns, bits, group = matrix.layout[:4]
    levels, scales, zeros = matrix.layout[4], matrix.layout[5:9], matrix.layout[9:]
    grid = levels == NONE and scales[:2] == (DENSE, rows) and (zeros == (NONE,) or zeros[:2] == (DENSE, rows))
    return 1 <= bits <= 8 and grid and (group >= columns or group % (8 if bits <= 4 else 4) == 0)


def can_run(query: Tensor) -> bool:
    """Whether the kernel was built, and computes with queries of this dtype and width, here."""
    whole = query.shape[-1] % 8 == 0 and native.number(query.dtype) is not None and query.device.type == "cpu"
    return whole and native.extension() is not None and native.chosen() is not None


def attend(query: Tensor, keys: Side, values: Side, mask: Tensor | None, scale: float, *, heads: int) -> Tensor:
    """softmax(query keys^T * scale, of what the mask leaves) values: `[batch, queries, query heads, width]`, summed in float32.

    `query [batch, query heads, queries, width]`; of the query heads as many neighbours as it takes share one of the `heads` of keys.
    `mask [batch or 1, queries, tokens]`: bool, what is seen, or numbers that are added to the scores. Where nothing is seen it is 0.
    """
    extension, isa = native.extension(), native.chosen()
    if extension is None or isa is None or not can_run(query):
        counts["definition"] += 1
        return define(query, keys, values, mask, scale, heads=heads)
    packed = any(segment.matrix is not None for side in (keys, values) for row in side for segment in row)
    counts["attend" if packed else "attend_dense"] += 1
    call = _Call()
    query = query.contiguous()
    output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    call.add_sizes(query, output, heads, sum(segment.tokens for segment in keys[0]), mask)
    for of_keys, of_values in zip(keys, values, strict=True):
        call.add_segments(of_keys)
        call.add_segments(of_values)
    extension.attend(isa, call.layout, call.buffers, scale, torch.get_num_threads())
    return output


def attend_dense(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
    """`attend` for keys and values `[batch, heads, tokens, width]` of one dtype, where they are; None where no kernel reads them there."""
    extension, isa, number = native.extension(), native.chosen(), native.number(keys.dtype)
    batch, heads, tokens, width = keys.shape
    lie = keys.stride(3) == values.stride(3) == 1 and values.dtype == keys.dtype and keys.is_cpu and values.is_cpu and query.is_cpu
    if extension is None or isa is None or number is None or not lie or width % 8 or native.number(query.dtype) is None:
        return None
    counts["attend_dense"] += 1
    call = _Call()
    query = query.contiguous()
    output = query.new_empty(batch, query.shape[2], query.shape[1], width)
    call.add_sizes(query, output, heads, tokens, mask)
    item = keys.element_size()
    for row in range(batch):
        for side in (keys, values):
            of_batch, of_head, of_token, _ = side.stride()
            size = (tokens - 1) * of_token + (heads - 1) * of_head + width
            call.layout += (1, _PLAIN, tokens, number, of_token, of_head)
            call.buffers += (side.data_ptr() + row * of_batch * item, size * item)
    extension.attend(isa, call.layout, call.buffers, scale, torch.get_num_threads())
    return output


def define(query: Tensor, keys: Side, values: Side, mask: Tensor | None, scale: float, *, heads: int) -> Tensor:
    """What `attend` computes, in torch and in the dtype of a float64 query, else in float32: segment by segment, none kept."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    found = []
    for row, (of_keys, of_values) in enumerate(zip(keys, values, strict=True)):
        asked = query[row].to(wide).unflatten(0, (heads, -1)) * scale  # [heads, share, queries, width]
        parts = [torch.einsum("hsqw,thw->hsqt", asked, segment.plain().to(wide)) for segment in of_keys]
        scores = torch.cat(parts, -1)
        if mask is not None:
            seen = mask[row if len(mask) > 1 else 0]
            scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen.to(wide)
        weights = torch.softmax(scores, -1)
        if mask is not None and mask.dtype == torch.bool:
            weights = torch.where(seen.any(-1, keepdim=True), weights, torch.zeros((), dtype=wide))
        pieces = weights.split([segment.tokens for segment in of_values], -1)
        pairs = zip(pieces, of_values, strict=True)
        total = sum(torch.einsum("hsqt,thw->qhsw", piece, segment.plain().to(wide)) for piece, segment in pairs)
        assert isinstance(total, Tensor)
        found.append(total.flatten(1, 2))
    return torch.stack(found).to(query.dtype)


class _Call:
    """What the kernel is told: sizes in the order of `attend` in csrc/bindings.cpp, and an address and a size for each buffer."""

    def __init__(self) -> None:
        self.layout: list[int] = []
        self.buffers: list[int] = []
        self._kept: list[Tensor] = []  # until the kernel has read them

    def add_sizes(self, query: Tensor, output: Tensor, heads: int, tokens: int, mask: Tensor | None) -> None:
        batch, query_heads, queries, width = query.shape
        number = native.number(query.dtype)
        assert number is not None
        self.layout += [batch, heads, query_heads // heads, queries, width, tokens, number]
        self._add(query, output)
        if mask is None:
            self.layout += [0, 0, 0]
            return
        if mask.dtype != torch.bool:
            mask = mask.float()
        if mask.stride(-1) != 1:
            mask = mask.contiguous()
        steps = (mask.stride(axis) if mask.shape[axis] > 1 else 0 for axis in (0, 1))
        self.layout += [1 if mask.dtype == torch.bool else 2, *steps]
        self._add_view(mask)

    def add_segments(self, segments: Sequence[Segment]) -> None:
        self.layout.append(len(segments))
        for segment in segments:
            if segment.matrix is not None:
                self.layout += (_PACKED, *segment.matrix.layout)
                self._add(*segment.matrix.tensors)
                continue
            plain = segment.plain()
            number = native.number(plain.dtype)
            if number is None or plain.stride(-1) != 1:
                plain, number = plain.float().contiguous(), 0
            self.layout += (_PLAIN, segment.tokens, number, plain.stride(0), plain.stride(1))
            self._add_view(plain)

    def _add(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self.buffers += (tensor.data_ptr(), tensor.nbytes)

    def _add_view(self, tensor: Tensor) -> None:
        """Up to the end of the memory that it is a view of."""
        self._kept.append(tensor)
        left = int(tensor.untyped_storage().nbytes()) - int(tensor.storage_offset()) * tensor.element_size()
        self.buffers += (tensor.data_ptr(), left)
