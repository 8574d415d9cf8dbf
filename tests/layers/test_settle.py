"""Layers whose stored tensors move to memory that kernels read fast."""

import torch

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.uniform import Uniform
from fewbits.kernels import native
from fewbits.layers.linear import CompressedLinear, StoredLinear


def test_large_tensors_are_copied_and_small_ones_stay_where_they_are():
    codes = torch.randint(256, (4096, 1100), dtype=torch.uint8)
    term = Uniform(codes, torch.rand(4096, 1).half(), None, 4096, 1100, 8, 1100)
    layer = CompressedLinear(StoredLinear(CompressedTensor((term,))))
    before, scales = layer.stored.tensors(), layer.stored.weight.terms[0].scales
    after = layer.settle().stored.tensors()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert layer.stored.weight.terms[0].scales is scales
    assert (layer.stored.weight.terms[0].codes is not codes) == bool(native.available())
    inputs = torch.randn(2, 1100)
    assert torch.equal(layer(inputs), term.matmul(inputs))
