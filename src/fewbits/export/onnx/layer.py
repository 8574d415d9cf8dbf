"""A compressed linear as a module of operations that ONNX has. The names of its buffers are what `reading` knows parts by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fewbits.core.tensor import CompressedTensor, Term, Transform
from fewbits.export.grids import read_grid
from fewbits.export.onnx.operators import NBits, Quantized
from fewbits.formats.dense import Dense
from fewbits.formats.diagonal import DiagonalScale
from fewbits.formats.lowrank import LowRank
from fewbits.formats.packing import unpack
from fewbits.formats.permutation import Permutation, Reordering
from fewbits.formats.rotation import Hadamard
from fewbits.formats.uniform import Uniform
from fewbits.formats.unrounded import Unrounded
from fewbits.layers.activation import TokenQuantizer
from fewbits.layers.group_activation import GroupQuantizer
from fewbits.layers.linear import StoredLinear

Operator = Literal["matmul_nbits", "qdq"]
OWN_DOMAIN = "fewbits"  # of nodes that `graph` makes standard ones: torch has no tensors of four bits
_TRACED = (TokenQuantizer, GroupQuantizer)  # quantizers of inputs that are settings alone


def refuses(stored: StoredLinear, operator: Operator) -> str | None:
    """Why a graph with `operator` does not hold a layer exactly; None where it does."""
    transforms = stored.weight.input_transforms + stored.weight.output_transforms
    for transform in transforms:
        if not isinstance(transform, (Permutation, Reordering, DiagonalScale, Hadamard)):
            return f"a {transform.kind} of its {'inputs' if transform in stored.weight.input_transforms else 'outputs'} has no nodes here"
    if stored.activation is not None and not isinstance(stored.activation, _TRACED):
        return f"its inputs are rounded ({stored.activation.kind}), for which there are no nodes here"
    reasons = (_refuses_term(term, operator) for term in stored.weight.terms)
    return next((reason for reason in reasons if reason is not None), None)


class GraphLinear(nn.Module):
    """y = W x + b with `stored`, which `refuses` lets pass; `bias` is the model's own parameter."""

    def __init__(self, stored: StoredLinear, operator: Operator, bias: nn.Parameter | None) -> None:
        super().__init__()
        weight = stored.weight
        self.before = nn.ModuleList(_changed(one) for one in weight.input_transforms)
        self.terms = nn.ModuleList(_product(term, operator) for term in weight.terms)
        self.after = nn.ModuleList(_changed(one) for one in weight.output_transforms)
        self.activation = cast(Any, stored.activation)
        self.unrounded = [term.reads_unrounded for term in weight.terms]
        self.bias = bias
        self.register_buffer("offset", None if stored.offset is None else stored.offset.float())

    def forward(self, inputs: Tensor) -> Tensor:
        for change in self.before:
            inputs = change(inputs)
        rounded = inputs if self.activation is None else self.activation.apply(inputs)
        products = [term(inputs if own else rounded) for term, own in zip(self.terms, self.unrounded, strict=True)]
        outputs = products[0]
        for product in products[1:]:
            outputs = outputs + product
        for change in self.after:
            outputs = change(outputs)
        for added in (self.offset, self.bias):
            outputs = outputs if added is None else outputs + added
        return outputs


class NBitsProduct(nn.Module):
    """One MatMulNBits node."""

    blob: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, held: NBits) -> None:
        super().__init__()
        for name in ("blob", "scales", "zero_points"):
            self.register_buffer(name, getattr(held, name))
        self.attributes = {"K": held.columns, "N": held.blob.shape[0], "bits": held.bits, "block_size": held.block}

    def forward(self, inputs: Tensor) -> Tensor:
        read = [inputs, self.blob, self.scales] + ([] if self.zero_points is None else [self.zero_points])
        shape = (*inputs.shape[:-1], self.attributes["N"])
        return _node("com.microsoft::MatMulNBits", read, self.attributes, inputs.dtype, shape)


class QuantizedProduct(nn.Module):
    """DequantizeLinear and a product of matrices."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, held: Quantized) -> None:
        super().__init__()
        for name in ("codes", "scales", "zero_points"):
            self.register_buffer(name, getattr(held, name))
        self.shape = held.shape
        blocks = {"axis": 1} if held.group_size is None else {"axis": 0, "block_size": held.group_size}
        self.attributes = {"bits": held.bits, "signed": int(held.zero_points is None), **blocks}

    def forward(self, inputs: Tensor) -> Tensor:
        read = [self.codes, self.scales] + ([] if self.zero_points is None else [self.zero_points])
        return inputs @ _node(f"{OWN_DOMAIN}::DequantizeLinear", read, self.attributes, inputs.dtype, self.shape)


class MatrixProduct(nn.Module):
    """With numbers as they are, `matrix [columns, rows]`."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix.contiguous())

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.matrix


class TwoProducts(nn.Module):
    """With `right`, then with `left`."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.left(self.right(inputs)))


class Reordered(nn.Module):
    """y[i] = x[order[i]]."""

    order: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order.to(torch.int32))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.index_select(-1, self.order)


class Scaled(nn.Module):
    """y = scale * x."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.float())

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale


class Rotated(nn.Module):
    """A Hadamard matrix as the Kronecker product of two small ones, `outer` of them on the left; signs come first or last.

    Two products of size sqrt(features) where butterflies would be log(features) times six nodes.
    """

    outer: Tensor
    inner: Tensor
    signs_first: Tensor | None
    signs_last: Tensor | None

    def __init__(self, transform: Hadamard) -> None:
        super().__init__()
        width = inner_size(transform.size)
        for name, size in (("outer", transform.size // width), ("inner", width)):
            matrix = Hadamard(size, None, transform.transposed)
            self.register_buffer(name, matrix.apply(torch.eye(size)).T.contiguous())
        flips = None if transform.signs is None else 1.0 - 2.0 * unpack(transform.signs, 1, transform.size)[0].float()
        self.register_buffer("signs_first", None if transform.transposed else flips)
        self.register_buffer("signs_last", flips if transform.transposed else None)

    def forward(self, inputs: Tensor) -> Tensor:
        flipped = inputs if self.signs_first is None else inputs * self.signs_first
        squares = flipped.unflatten(-1, (self.outer.shape[0], self.inner.shape[0]))
        turned = (self.outer @ squares @ self.inner).flatten(-2)  # the inner one, Sylvester's, is its own transpose
        return turned if self.signs_last is None else turned * self.signs_last


def inner_size(size: int) -> int:
    """The largest power of two that divides `size` and is no more than its root."""
    width = 1
    while size % (2 * width) == 0 and (2 * width) ** 2 <= size:
        width *= 2
    return width


def _held(term: Term, operator: Operator) -> NBits | Quantized | str:
    """A grid as the operator has it, or why it does not."""
    real = term.unpacked_zero_points() if isinstance(term, Uniform) and term.zero_points is not None else None
    if isinstance(term, Uniform) and operator == "matmul_nbits" and real is not None and not torch.equal(real, real.round()):
        grid = read_grid(CompressedTensor((replace(term, zero_points=None),)))
        shape = (term.rows, -(-term.columns // term.group_size))
        return grid if isinstance(grid, str) else NBits.of(grid, real.expand(shape))
    grid = read_grid(CompressedTensor((term,)))
    if isinstance(grid, str):
        return grid
    return NBits.of(grid) if operator == "matmul_nbits" else Quantized.of(grid)


def _refuses_term(term: Term, operator: Operator) -> str | None:
    if isinstance(term, Unrounded):
        return _refuses_term(term.inner, operator)
    if isinstance(term, LowRank):
        return _refuses_term(term.left, operator) or _refuses_term(term.right, operator)
    found = None if isinstance(term, Dense) else _held(term, operator)
    return found if isinstance(found, str) else None


def _product(term: Term, operator: Operator) -> nn.Module:
    if isinstance(term, Unrounded):
        return _product(term.inner, operator)
    if isinstance(term, LowRank):
        return TwoProducts(_product(term.left, operator), _product(term.right, operator))
    if isinstance(term, Dense):
        return MatrixProduct(term.decode().T)
    held = _held(term, operator)
    assert not isinstance(held, str)  # `refuses` was asked
    return NBitsProduct(held) if isinstance(held, NBits) else QuantizedProduct(held)


def _changed(transform: Transform) -> nn.Module:
    if isinstance(transform, DiagonalScale):
        return Scaled(transform.scale)
    if isinstance(transform, Hadamard):
        return Rotated(transform)
    assert isinstance(transform, (Permutation, Reordering))
    return Reordered(transform.order() if isinstance(transform, Reordering) else transform.order)


def _node(name: str, inputs: list[Tensor], attributes: Mapping[str, int], dtype: torch.dtype, shape: tuple[Any, ...]) -> Tensor:
    """One node of the graph, whose values torch does not know."""
    return cast(Tensor, torch.onnx.ops.symbolic(name, inputs, dict(attributes), dtype=dtype, shape=shape, version=1))
