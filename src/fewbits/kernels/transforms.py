"""Transforms of vectors before a product: natively where that serves, or nobody, and the caller's torch definition does.

The kernels are the custom operators `fewbits::rotate` and `fewbits::reorder`, so that torch.compile keeps one graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels import native
from fewbits.kernels.dispatch import counted, counts, usable


def rotate(vectors: Tensor, order: int, signs: Tensor | None, seed: Tensor | None, *, signs_last: bool) -> Tensor | None:
    """`vectors [..., size]` times a Hadamard matrix, as `native.rotate` has it; None where the definition must serve."""
    held = (vectors, *(() if signs is None else (signs,)))
    if not counted(vectors.numel() > 0 and usable(vectors.dtype, held)):
        return None
    function = _rotate if _plain(vectors) else _rotate_op
    return function(vectors, order, signs, seed, signs_last)


def reorder(vectors: Tensor, packed: Tensor, bits: int, features: int) -> Tensor | None:
    """`vectors [..., features]` in the order that `packed` indices of so many bits say; None where the definition must serve."""
    there = vectors.numel() > 0 and vectors.shape[-1] == features
    if not counted(there and usable(vectors.dtype, (vectors, packed))):
        return None
    return (_reorder if _plain(vectors) else _reorder_op)(vectors, packed, bits)


def _plain(vectors: Tensor) -> bool:
    return type(vectors) is Tensor and not torch.compiler.is_compiling()


def _rotate(vectors: Tensor, order: int, signs: Tensor | None, seed: Tensor | None, signs_last: bool) -> Tensor:
    isa = native.chosen()
    assert isa is not None
    counts["rotate"] += 1
    return native.rotate(isa, vectors, order, signs, seed, signs_last)


def _reorder(vectors: Tensor, packed: Tensor, bits: int) -> Tensor:
    counts["reorder"] += 1
    return native.reorder(vectors, packed, bits)


_LIBRARY = torch.library.Library("fewbits", "FRAGMENT")
_LIBRARY.define("rotate(Tensor vectors, int order, Tensor? signs, Tensor? seed, bool signs_last) -> Tensor")
_LIBRARY.define("reorder(Tensor vectors, Tensor packed, int bits) -> Tensor")
_LIBRARY.impl("rotate", _rotate, "CPU")
_LIBRARY.impl("reorder", _reorder, "CPU")
_rotate_op = torch.ops.fewbits.rotate.default
_reorder_op = torch.ops.fewbits.reorder.default


@torch.library.register_fake("fewbits::rotate", lib=_LIBRARY)
def _shape_of_rotated(vectors: Tensor, order: int, signs: Tensor | None, seed: Tensor | None, signs_last: bool) -> Tensor:
    return torch.empty(vectors.shape, dtype=vectors.dtype, device=vectors.device)


@torch.library.register_fake("fewbits::reorder", lib=_LIBRARY)
def _shape_of_reordered(vectors: Tensor, packed: Tensor, bits: int) -> Tensor:
    return torch.empty(vectors.shape, dtype=vectors.dtype, device=vectors.device)
