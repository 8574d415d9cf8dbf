"""One linear as compressed-tensors holds it: its tensors, and the scheme that says what they mean. Both directions.

Facts from the package compressed-tensors, version 0.20: codes are packed without gaps from version 0.18 on, in 32 // bits a word
before; zero points lie around zero, less 2**(bits-1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, Part
from fewbits.export.grids import Grid, not_one_term, read_grid
from fewbits.export.words import from_padded_words, from_words, to_words
from fewbits.formats.minifloat import E2M1, E4M3, Minifloat
from fewbits.formats.packing import unpack
from fewbits.layers.activation import TokenQuantizer
from fewbits.layers.float_activation import FloatQuantizer
from fewbits.layers.linear import StoredLinear
from fewbits.layers.static_activation import StaticQuantizer

PACKED, INTEGERS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4, NAIVE = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "naive-quantized"
FORMATS = (PACKED, INTEGERS, FLOATS, NVFP4, MXFP4, NAIVE)


@dataclass(frozen=True)
class Scheme:
    """How the weights of a group of layers are written, and how their inputs are rounded; JSON-able as the package reads it."""

    format: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None

    def described(self, targets: list[str]) -> dict[str, Any]:
        """A config group."""
        return {
            "targets": targets,
            "weights": self.weights,
            "input_activations": self.inputs,
            "output_activations": None,
            "format": self.format,
        }


def hold(stored: StoredLinear) -> tuple[dict[str, Tensor], Scheme] | str:
    """The layer's tensors by their names inside the module, and its scheme; or why there is none."""
    inputs = _hold_inputs(stored.activation)
    if isinstance(inputs, str):
        return inputs
    term = stored.weight.terms[0]
    floats = isinstance(term, Minifloat)
    weight = _hold_floats(stored.weight, term) if isinstance(term, Minifloat) else _hold_integers(stored.weight, inputs[1])
    if isinstance(weight, str):
        return weight
    if inputs[1] is not None and (weight[1] not in (FLOATS, INTEGERS, PACKED) or floats != (inputs[1]["type"] == "float")):
        return f"{weight[1]} weights have no scheme with inputs rounded by a {stored.activation.kind if stored.activation else None}"
    return weight[0] | inputs[0], Scheme(*weight[1:], inputs[1])


def unhold(tensors: Mapping[str, Tensor], scheme: Scheme) -> StoredLinear:
    """The layer that `tensors` and `scheme` stand for: the inverse of `hold`. Raises InputError for what has no exact term."""
    weight = _WEIGHTS[scheme.format](tensors, scheme.weights)
    return StoredLinear(weight, _read_inputs(tensors, scheme.inputs))


def cache_scheme(kind: str | None) -> dict[str, Any] | None:
    """How keys and values are cached: "fp8" or "int8", each layer with one scale of its own for each; None: as they are."""
    return None if kind is None else _arguments(8, "float" if kind == "fp8" else "int", "tensor")


def _hold_inputs(activation: Part | None) -> tuple[dict[str, Tensor], dict[str, Any] | None] | str:
    """Tensors and arguments."""
    if activation is None:
        return {}, None
    if isinstance(activation, TokenQuantizer) and activation.bits_per_value == 8:
        return {}, _arguments(8, "int", activation.granularity, dynamic=True)
    if isinstance(activation, StaticQuantizer) and activation.bits_per_value == 8:
        tensors = {"input_scale": activation.scale}
        if not activation.signed:
            tensors["input_zero_point"] = torch.full((1,), -128, dtype=torch.int8)
        return tensors, _arguments(8, "int", "tensor", symmetric=activation.signed)
    if isinstance(activation, FloatQuantizer):
        tensors = {} if activation.scale is None else {"input_scale": activation.scale}
        strategy = activation.granularity if activation.scale is None else "tensor"
        return tensors, _arguments(8, "float", strategy, dynamic=activation.scale is None)
    return f"its inputs are rounded by a {activation.kind} that is not of 8 bits with one scale for each token or all"


def _hold_integers(weight: CompressedTensor, inputs: Mapping[str, Any] | None) -> tuple[dict[str, Tensor], str, dict[str, Any]] | str:
    """Tensors, format and arguments of a uniform grid."""
    read = read_grid(weight)
    if isinstance(read, str):
        return read
    if (grid := read.unordered()) is None:
        return "a permutation of its inputs scatters its groups, and group indices have no place there"
    rows, columns = grid.codes.shape
    if not 2 <= grid.bits <= 8:
        return f"its codes have {grid.bits} bits, where 2 to 8 have a place"
    if not grid.whole_rows and columns % grid.group_size:
        return f"groups of {grid.group_size} do not divide its {columns} columns"
    half = 2 ** (grid.bits - 1)
    strategy = {"strategy": "channel"} if grid.whole_rows else {"strategy": "group", "group_size": grid.group_size}
    arguments = _arguments(grid.bits, "int", symmetric=grid.symmetric, **strategy)
    if grid.bits == 8 and inputs is not None:
        tensors = {"weight": (grid.codes.short() - half).to(torch.int8), "weight_scale": grid.scales}
        if not grid.symmetric:
            tensors["weight_zero_point"] = (grid.zero_points.short() - half).to(torch.int8)
        return tensors, INTEGERS, arguments
    tensors = {"weight_packed": to_words(grid.codes, grid.bits), "weight_scale": grid.scales, "weight_shape": torch.tensor([rows, columns])}
    if not grid.symmetric:
        tensors["weight_zero_point"] = to_words(grid.zero_points.T, grid.bits).T
    return tensors, PACKED, arguments


def _hold_floats(weight: CompressedTensor, term: Minifloat) -> tuple[dict[str, Tensor], str, dict[str, Any]] | str:
    """Tensors, format and arguments of small floating-point numbers."""
    if (reason := not_one_term(weight)) is not None:
        return reason
    if weight.input_transforms:
        return f"a {weight.input_transforms[0].kind} of its inputs has no place there"
    rows, columns = term.shape
    if term.layout == E4M3 and term.scale_format == "float" and term.tensor_scale is None:
        if term.block_size < columns:
            return "its E4M3 numbers have scales for groups, where one for each row or all has a place"
        whole = term.scales.shape[0] == 1 and rows > 1
        numbers = unpack(term.codes, 8, columns).contiguous().view(torch.float8_e4m3fn)
        scales = term.scales.flatten() if whole else term.scales
        return {"weight": numbers, "weight_scale": scales}, FLOATS, _arguments(8, "float", "tensor" if whole else "channel")
    size = {"e4m3": 16, "e8m0": 32}.get(term.scale_format)
    if term.layout != E2M1 or size is None or term.block_size != size or columns % size or term.scales.shape[0] != rows:
        numbers_are = f"E{term.exponent_bits}M{term.mantissa_bits} numbers in blocks of {term.block_size} with {term.scale_format} scales"
        return f"its {numbers_are} are neither NVFP4 (E2M1, blocks of 16, e4m3), MXFP4 (E2M1, blocks of 32, e8m0) nor E4M3 by rows"
    tensors = {"weight_packed": term.codes, "weight_scale": term.scales}
    if term.scale_format == "e8m0":
        return tensors, MXFP4, _arguments(4, "float", "group", group_size=32, scale_dtype="torch.uint8")
    scale = torch.ones(1) if term.tensor_scale is None else term.tensor_scale
    tensors |= {"weight_scale": term.scales.view(torch.float8_e4m3fn), "weight_global_scale": 1 / scale}
    return tensors, NVFP4, _arguments(4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")


def _arguments(
    bits: int, kind: str, strategy: str, *, symmetric: bool = True, dynamic: bool = False, group_size: int | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
    } | more


def _read_packed(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> CompressedTensor:
    bits, scales = int(arguments["num_bits"]), _scales(tensors["weight_scale"])
    rows, columns = (int(size) for size in tensors["weight_shape"])
    words = tensors["weight_packed"]
    dense = words.shape[1] == -(-columns * bits // 32)
    read = from_words if dense else from_padded_words
    zeros = tensors.get("weight_zero_point")
    if zeros is not None and zeros.dtype == torch.int32:
        zeros = read(zeros.T, bits, rows).T.contiguous()
    elif zeros is not None:
        zeros = _around_zero(zeros, bits)
    return _uniform(read(words, bits, columns), scales, zeros, arguments, tensors.get("weight_g_idx"))


def _read_integers(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> CompressedTensor:
    bits, zeros = int(arguments["num_bits"]), tensors.get("weight_zero_point")
    codes = _around_zero(tensors["weight"], bits)
    return _uniform(codes, _scales(tensors["weight_scale"]), None if zeros is None else _around_zero(zeros, bits), arguments, None)


def _uniform(codes: Tensor, scales: Tensor, zeros: Tensor | None, arguments: Mapping[str, Any], groups: Tensor | None) -> CompressedTensor:
    rows, columns = codes.shape
    size = int(arguments.get("group_size") or columns) if arguments["strategy"] == "group" else columns
    if arguments.get("strategy") not in ("group", "channel", "tensor"):
        raise InputError(
            f"whole numbers of the strategy {arguments.get('strategy')!r} are not read; group, channel or tensor would be right"
        )
    scales = scales.expand(rows, -1).contiguous()
    symmetric = bool(arguments.get("symmetric", True)) or zeros is None
    bits = int(arguments["num_bits"])
    wide = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8) if symmetric or zeros is None else zeros.expand_as(scales)
    order = None if groups is None or bool((groups < 0).any()) else torch.argsort(groups.long(), stable=True)
    codes = codes if order is None else codes[:, order]
    return Grid(codes, scales, wide.contiguous(), symmetric, bits, size, order).stored()


def _read_floats(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> CompressedTensor:
    numbers, scales = tensors["weight"], _scales(tensors["weight_scale"])
    if numbers.dtype != torch.float8_e4m3fn:
        raise InputError(f"weights are {numbers.dtype}, where torch.float8_e4m3fn would be right")
    rows, columns = numbers.shape
    size = columns
    if arguments["strategy"] == "block":
        height, size = (int(one) for one in arguments["block_structure"])
        scales = scales.repeat_interleave(height, dim=0)[:rows].contiguous()
    term = Minifloat(numbers.view(torch.uint8), scales, None, rows, columns, 4, 3, "nan", size, "float")
    return CompressedTensor((term,))


def _read_four_bits(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> CompressedTensor:
    codes, scales = tensors["weight_packed"], tensors["weight_scale"]
    columns, size = 2 * codes.shape[1], int(arguments["group_size"])
    scale_format, tensor_scale = "e8m0", None
    if scales.dtype == torch.float8_e4m3fn:
        scale_format, tensor_scale = "e4m3", 1 / tensors["weight_global_scale"].float().reshape(1)
    term = Minifloat(codes, scales.view(torch.uint8), tensor_scale, codes.shape[0], columns, 2, 1, "none", size, scale_format)
    return CompressedTensor((term,))


def _read_naive(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> CompressedTensor:
    return (_read_floats if arguments["type"] == "float" else _read_integers)(tensors, arguments)


_WEIGHTS = {
    PACKED: _read_packed,
    INTEGERS: _read_integers,
    FLOATS: _read_floats,
    NVFP4: _read_four_bits,
    MXFP4: _read_four_bits,
    NAIVE: _read_naive,
}


def _read_inputs(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any] | None) -> Part | None:
    """Raises InputError where inputs are rounded as no part of ours rounds them."""
    if arguments is None:
        return None
    bits, kind, strategy, dynamic = (arguments.get(name) for name in ("num_bits", "type", "strategy", "dynamic"))
    if bits == 8 and kind == "float" and arguments.get("symmetric", True) and strategy in ("token", "tensor"):
        return FloatQuantizer(granularity=strategy) if dynamic else FloatQuantizer(_one(tensors["input_scale"]), "tensor")
    if kind == "int" and bits == 8 and dynamic is True and arguments.get("symmetric", True) and strategy in ("token", "tensor"):
        return TokenQuantizer(bits, strategy)
    if kind == "int" and bits == 8 and not dynamic and strategy == "tensor":
        zero = tensors.get("input_zero_point")
        if arguments.get("symmetric", True):
            return StaticQuantizer(_one(tensors["input_scale"]), 8, True)
        if zero is not None and int(zero) == -128:
            return StaticQuantizer(_one(tensors["input_scale"]), 8, False)
    raise InputError(
        f"inputs of {bits} bits ({kind}, {strategy}, dynamic={dynamic}) are not read; 8 bits for each token or all would be right"
    )


def _scales(scales: Tensor) -> Tensor:
    """A matrix; one number is `[1, 1]`."""
    return scales.reshape(-1, 1) if scales.ndim < 2 else scales


def _one(value: Tensor) -> Tensor:
    return value.float().reshape(1)


def _around_zero(values: Tensor, bits: int) -> Tensor:
    """int8 codes and zero points to uint8 ones."""
    return (values.short() + 2 ** (bits - 1)).to(torch.uint8)
