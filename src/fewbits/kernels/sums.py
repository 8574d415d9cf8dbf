"""Sums of terms that are multiplied with the same inputs in one native call, or nobody computes them, and the caller adds products up.

The kernel is the custom operator `fewbits::multiply_sums`, so that torch.compile keeps one graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbits.kernels import native
from fewbits.kernels.dispatch import FEW_VECTORS, counts, kept_sums, may_be_kept, on_gpu, usable
from fewbits.kernels.layout import Description

Factors = tuple[Description, ...]  # a matrix, or two: what inputs meet last, and what they meet first


def may_add(inputs: Tensor) -> bool:
    """Whether sums of these inputs `[..., columns]` are worth describing: few vectors, on the CPU."""
    return 0 < inputs.numel() <= FEW_VECTORS * inputs.shape[-1] and inputs.device.type == "cpu" and not on_gpu(inputs)


def describe_sum(terms: Sequence[Factors] | None, biases: Sequence[Tensor] = ()) -> Description | None:
    """Terms of one shape, and `biases [rows]` that are added after that; None where kernels do not read a term or a bias.

    The order is that of `read_sum` in csrc/sum_bindings.cpp, which checks every size.
    """
    if terms is None:
        return None
    tensors: list[Tensor] = []
    layout = [len(terms)]
    for factors in terms:
        layout.append(len(factors) - 1)
        for matrix in factors:
            tensors += matrix.tensors
            layout += matrix.layout
    layout.append(len(biases))
    for bias in biases:
        kind = native.number(bias.dtype)
        if kind is None:
            return None
        tensors.append(bias)
        layout.append(kind)
    return Description(tuple(tensors), tuple(layout))


def multiply_sums(sums: Sequence[Description], rows: Sequence[int], inputs: Tensor) -> list[Tensor] | None:
    """`inputs [..., columns]` times each of some sums, which have so many `rows`, in the inputs' dtype: terms are added in float32.

    What was seen of a single one is kept as long as its description lives.
    None where a kernel does not serve: as `dispatch.multiply` has it, and for more than `FEW_VECTORS` vectors.
    """
    if not may_add(inputs):
        return None
    plain = type(inputs) is Tensor and not torch.compiler.is_compiling()
    if plain and len(sums) == 1:
        kept = kept_sums(sums[0], lambda isa: _look_at(isa, sums[0], rows, inputs.shape[-1]), inputs)
        if kept is not None:
            counts["multiply_sums"] += 1
            return kept.multiply(inputs)
    tensors = tuple(tensor for one in sums for tensor in one.tensors)
    layout = tuple(number for one in sums for number in one.layout)
    whole = all(tensor.is_contiguous() for tensor in tensors) and min(*rows, inputs.shape[-1]) > 0
    if not whole or not usable(inputs.dtype, (inputs, *tensors)):
        return None
    return (_multiply_sums if plain else _multiply_sums_op)(inputs, tensors, layout, list(rows))


def _look_at(isa: str, one: Description, rows: Sequence[int], columns: int) -> native.Sums | None:
    whole = min(*rows, columns) > 0 and may_be_kept(one.tensors)
    return native.Sums(isa, one.tensors, one.layout, columns, rows, FEW_VECTORS) if whole else None


def _multiply_sums(inputs: Tensor, tensors: Sequence[Tensor], layout: Sequence[int], rows: Sequence[int]) -> list[Tensor]:
    isa = native.chosen()
    assert isa is not None
    counts["multiply_sums"] += 1
    return native.Sums(isa, tensors, layout, inputs.shape[-1], rows, FEW_VECTORS).multiply(inputs)


_LIBRARY = torch.library.Library("fewbits", "FRAGMENT")
_LIBRARY.define("multiply_sums(Tensor inputs, Tensor[] tensors, int[] layout, int[] rows) -> Tensor[]")
_LIBRARY.impl("multiply_sums", _multiply_sums, "CPU")
_multiply_sums_op = torch.ops.fewbits.multiply_sums.default


@torch.library.register_fake("fewbits::multiply_sums", lib=_LIBRARY)
def _shapes_of_products(inputs: Tensor, tensors: list[Tensor], layout: list[int], rows: list[int]) -> list[Tensor]:
    return [inputs.new_empty(*inputs.shape[:-1], count) for count in rows]
