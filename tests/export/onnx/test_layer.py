"""Layers as nodes: what onnxruntime computes with them, and what is read back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fewbits.core.tensor import CompressedTensor
from fewbits.export.onnx import graph
from fewbits.export.onnx.layer import GraphLinear, refuses
from fewbits.export.onnx.reading import read_layers
from fewbits.formats.dense import Dense
from fewbits.formats.diagonal import DiagonalScale
from fewbits.formats.lowrank import LowRank
from fewbits.formats.permutation import PackedPermutation, Permutation
from fewbits.formats.rotation import Hadamard
from fewbits.formats.ternary import Ternary
from fewbits.formats.uniform import Uniform
from fewbits.formats.unrounded import Unrounded
from fewbits.layers.activation import TokenQuantizer
from fewbits.layers.group_activation import GroupQuantizer
from fewbits.layers.linear import CompressedLinear, StoredLinear

onnx_ir = pytest.importorskip("onnx_ir", reason="pip install 'fewbits[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'fewbits[onnx]'")
COLUMNS = 96
DRAW = torch.Generator().manual_seed(0)


def uniform(bits, size, rows=40, columns=COLUMNS, symmetric=False):
    groups = -(-columns // size)
    codes = torch.randint(2**bits, (rows, columns), generator=DRAW).to(torch.uint8)
    zeros = None if symmetric else torch.randint(2**bits, (rows, groups), generator=DRAW).to(torch.uint8)
    scales = (torch.rand(rows, groups, generator=DRAW) + 0.01).half()
    return Uniform.from_codes(codes, scales, zeros, bits=bits, group_size=size)


def dense(rows, columns):
    return Dense(torch.randn(rows, columns, generator=DRAW).half())


def weight(*terms, before=(), after=()):
    return CompressedTensor(terms, before, after)


def layers():
    """By a name: every part that a graph holds."""
    order, scale = torch.randperm(COLUMNS, generator=DRAW), torch.rand(COLUMNS, generator=DRAW) + 0.5
    low = LowRank(dense(40, 4), dense(4, COLUMNS))
    few = LowRank(uniform(8, 16, columns=32), uniform(4, 32, rows=32))
    rotations = [Hadamard.random(COLUMNS, DRAW), Hadamard(COLUMNS).transpose(), Hadamard.random(COLUMNS, DRAW).transpose()]
    found = {
        "plain": StoredLinear(weight(uniform(4, 32))),
        "ordered": StoredLinear(weight(uniform(4, 16), before=(Permutation.from_order(order),))),
        "scaled": StoredLinear(weight(uniform(8, 32), before=(DiagonalScale(scale),))),
        "outputs": StoredLinear(weight(uniform(4, COLUMNS), after=(PackedPermutation.from_order(torch.randperm(40, generator=DRAW)),))),
        "sum": StoredLinear(weight(uniform(4, 32), low)),
        "few": StoredLinear(weight(few, uniform(4, 48, symmetric=True)), None, torch.randn(40, generator=DRAW)),
        "rounded": StoredLinear(weight(uniform(4, 32, symmetric=True)), TokenQuantizer()),
        "groups": StoredLinear(weight(uniform(4, 32), Unrounded(low)), GroupQuantizer(8, 40)),
    }
    return found | {f"rotated{place}": StoredLinear(weight(uniform(4, 32), before=(one,))) for place, one in enumerate(rotations)}


def real_zeros(bits, size):
    one = uniform(bits, size)
    return replace(one, zero_points=torch.rand(one.scales.shape, generator=DRAW).half() * 7)


class Many(nn.Module):
    """All layers on one input."""

    def __init__(self, layers, operator):
        super().__init__()
        self.model = nn.ModuleDict({name: GraphLinear(stored, operator, None) for name, stored in layers.items()})

    def forward(self, inputs):
        return [layer(inputs) for layer in self.model.values()]


def written(layers, operator, folder):
    """A session with the graph of all layers, written as a model's is."""
    call = graph.Call((torch.zeros(2, 3, COLUMNS),), ({0: torch.export.Dim("batch")},), ["inputs"], list(layers))
    many = Many(layers, operator)
    graph.save(graph.trace(many, call, "a test"), many.model, folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # else inputs of 4-bit layers are rounded to 8 bits
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["matmul_nbits", "qdq"])
def test_nodes_compute_what_the_layer_does_and_read_back_as_it(operator, tmp_path):
    every = layers() | ({"real": StoredLinear(weight(real_zeros(4, 32)))} if operator == "matmul_nbits" else {})
    assert all(refuses(stored, operator) is None for stored in every.values())
    opened = written(every, operator, tmp_path)
    inputs = torch.randn(5, 3, COLUMNS, generator=torch.Generator().manual_seed(1))
    for (name, stored), theirs in zip(every.items(), opened.run(None, {"inputs": inputs.numpy()}), strict=True):
        ours = CompressedLinear(stored)(inputs).numpy()
        assert np.linalg.norm(theirs - ours) / np.linalg.norm(ours) < 1e-6, name
    again = dict(read_layers(tmp_path))
    assert set(again) == set(every)
    for name, stored in every.items():
        assert torch.equal(again[name].weight.decode(), stored.weight.decode()), name
        assert [type(one) for one in again[name].weight.terms] == [type(one) for one in stored.weight.terms]
        assert (again[name].activation is None) == (stored.activation is None)
        if stored.activation is not None:
            assert again[name].activation.settings() == stored.activation.settings()


@pytest.mark.parametrize(
    ("stored", "nbits", "qdq"),
    [
        (lambda: weight(uniform(3, 32)), "codes have 3 bits, where MatMulNBits has 2, 4 and 8", "where DequantizeLinear has 4 and 8"),
        (lambda: weight(uniform(2, 32)), None, "its codes have 2 bits"),
        (lambda: weight(uniform(4, 24)), "groups of 24 inputs are no multiple of 16", None),
        (lambda: weight(real_zeros(4, 32)), None, "its zero points are no whole numbers among the codes"),
        (lambda: weight(real_zeros(8, 32)), "which MatMulNBits has beside codes of 2 and 4 bits alone", "its zero points are no whole"),
        (lambda: weight(Ternary.from_signs(torch.ones(4, 32, dtype=torch.int8), None)), None, "its codes have 2 bits"),
    ],
)
def test_what_an_operator_cannot_hold_is_said(stored, nbits, qdq):
    layer = StoredLinear(stored())
    for operator, says in (("matmul_nbits", nbits), ("qdq", qdq)):
        found = refuses(layer, operator)
        assert found is None if says is None else says in found
