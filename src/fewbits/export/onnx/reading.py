"""The compressed linears of a graph that `graph` wrote, by the names of its initializers: the inverse of `layer`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.core.errors import InputError, reason_of
from fewbits.core.tensor import CompressedTensor, Part, Term, Transform, from_stored
from fewbits.export.grids import Grid, in_16_bits
from fewbits.export.onnx.graph import MODEL, PRODUCER, QUANTIZERS, package
from fewbits.export.onnx.operators import NBits, Quantized
from fewbits.formats.dense import Dense
from fewbits.formats.diagonal import DiagonalScale
from fewbits.formats.lowrank import LowRank
from fewbits.formats.packing import pack
from fewbits.formats.permutation import Permutation
from fewbits.formats.rotation import Hadamard
from fewbits.formats.uniform import Uniform
from fewbits.formats.unrounded import Unrounded
from fewbits.layers.linear import StoredLinear

_WIDTHS = {"INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8}


def is_graph(folder: Path) -> bool:
    """Whether `folder` holds a graph that this package wrote."""
    if not (folder / MODEL).is_file():
        return False
    with open(folder / MODEL, "rb") as file:  # the second field of a model, which tells without the package
        return b"\x12" + bytes([len(PRODUCER)]) + PRODUCER.encode() in file.read(16)


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every initializer with an axis; numbers of four bits as whole ones. Single numbers are the program's: masks hold infinity."""
    for name, value in _opened(folder).graph.initializers.items():
        if len(value.const_value.shape):
            yield name, _tensor(value.const_value)


def read_layers(folder: Path) -> Iterator[tuple[str, StoredLinear]]:
    """The compressed linears by the names of the model's modules.

    Raises InputError where the file is damaged, or holds what this package does not write.
    """
    model = _opened(folder)
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    nodes = {node.inputs[place].name: node for node in model.graph for place in _CODES.get(node.op_type, ()) if node.inputs[place]}
    layers = dict.fromkeys(name.partition(".terms.")[0] for name in held if ".terms." in name)
    quantizers = json.loads(model.metadata_props.get(QUANTIZERS, "{}"))
    for layer in layers:
        try:
            yield layer, _layer(_Reader(held, nodes), layer, quantizers.get(layer))
        except (KeyError, ValueError, InputError) as error:
            raise InputError(f"{folder / MODEL}: {layer}: {error}") from error


_CODES = {"MatMulNBits": (1,), "DequantizeLinear": (0,)}  # which input of a node are the codes


class _Reader:
    """Initializers by their names, and the nodes that read codes by the names of these."""

    def __init__(self, held: Mapping[str, Any], nodes: Mapping[str, Any]) -> None:
        self.held, self.nodes = held, nodes

    def tensor(self, name: str) -> Tensor | None:
        return _tensor(self.held[name]) if name in self.held else None

    def needed(self, name: str) -> Tensor:
        return _tensor(self.held[name])

    def children(self, name: str) -> list[str]:
        """`name`.0, `name`.1, and so on, as far as there are any."""
        found: list[str] = []
        while any(one.startswith(f"{name}.{len(found)}.") for one in self.held):
            found.append(f"{name}.{len(found)}")
        return found

    def term(self, name: str) -> Term:
        if any(one.startswith(f"{name}.left.") for one in self.held):
            return LowRank(self.term(f"{name}.left"), self.term(f"{name}.right"))
        if f"{name}.matrix" in self.held:
            return Dense(self.needed(f"{name}.matrix").T.contiguous())
        grid, zeros = self._grid(name), self.tensor(f"{name}.zero_points")
        if zeros is None or not zeros.is_floating_point():
            return grid.stored().terms[0]
        return Uniform.from_codes(grid.codes, grid.scales, zeros.view(grid.scales.shape), bits=grid.bits, group_size=grid.group_size)

    def transform(self, name: str) -> Transform:
        if f"{name}.order" in self.held:
            return Permutation.from_order(self.needed(f"{name}.order"))
        if f"{name}.scale" in self.held:
            return DiagonalScale(self.needed(f"{name}.scale"))
        outer, inner = (self.needed(f"{name}.{part}").float() for part in ("outer", "inner"))
        first, last = (self.tensor(f"{name}.signs_{place}") for place in ("first", "last"))
        flips = last if first is None else first
        signs = None if flips is None else pack((flips < 0).to(torch.uint8)[None], 1)
        plain = Hadamard(len(outer)).apply(torch.eye(len(outer))).T
        turned = last is not None or (first is None and not torch.equal(plain, outer))
        return Hadamard(len(outer) * len(inner), signs, turned)

    def _grid(self, name: str) -> Grid:
        scales = self.needed(f"{name}.scales")
        zeros = self.held.get(f"{name}.zero_points")
        if f"{name}.blob" in self.held:
            node = self.nodes[f"{name}.blob"]
            columns, bits = node.attributes["K"].as_int(), node.attributes["bits"].as_int()
            packed = None if zeros is None else _tensor(zeros)
            grid = NBits(self.needed(f"{name}.blob"), scales.float(), packed, columns, bits).grid()
        else:
            codes = self.held[f"{name}.codes"]
            attributes = self.nodes[f"{name}.codes"].attributes
            size = attributes["block_size"].as_int() if "block_size" in attributes else None
            shape = (int(codes.shape[0]), int(codes.shape[1]))
            packed = None if zeros is None else _raw(zeros)
            grid = Quantized(_raw(codes), scales.float(), packed, shape, _WIDTHS[codes.dtype.name], size).grid()
        narrow = in_16_bits(grid.scales)
        if narrow is None:
            raise InputError("scales are not exact in 16 bits")
        return Grid(grid.codes, narrow, grid.zero_points, grid.symmetric, grid.bits, grid.group_size)


def _layer(reader: _Reader, name: str, quantizer: Mapping[str, Any] | None) -> StoredLinear:
    unrounded = [] if quantizer is None else list(quantizer["unrounded"])
    terms = [reader.term(one) for one in reader.children(f"{name}.terms")]
    terms = [Unrounded(term) if place in unrounded else term for place, term in enumerate(terms)]
    before, after = (tuple(reader.transform(one) for one in reader.children(f"{name}.{part}")) for part in ("before", "after"))
    activation: Part | None = None if quantizer is None else from_stored(quantizer["settings"], {})
    return StoredLinear(CompressedTensor(tuple(terms), before, after), activation, reader.tensor(f"{name}.offset"))


def _opened(folder: Path) -> Any:
    _, onnx_ir = package()
    try:
        return onnx_ir.load(folder / MODEL)
    except Exception as error:  # protobuf raises exceptions of its own
        reason = reason_of(error)
        raise InputError(f"{folder / MODEL} cannot be read as ONNX ({reason}); it may be cut short: copy it again") from error


def _raw(held: Any) -> Tensor:
    """uint8, as the file's bytes are."""
    return torch.from_numpy(np.frombuffer(held.tobytes(), np.uint8).copy())


def _tensor(held: Any) -> Tensor:
    values = held.numpy()
    if held.dtype.name == "BFLOAT16":
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values.astype(np.int8) if held.dtype.name in ("INT4", "UINT4") else values.copy())
