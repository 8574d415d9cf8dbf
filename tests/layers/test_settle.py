"""Layers whose stored tensors move to memory that kernels read fast."""

from itertools import pairwise

import pytest
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


@pytest.mark.skipif(not native.available(), reason="without kernels tensors stay where they are")
def test_small_tensors_of_layers_that_share_rooms_lie_together_apart_and_unchanged():
    rooms, layers = native.Rooms(), []
    for rows in (24, 40):
        codes = torch.randint(256, (rows, 33), dtype=torch.uint8)
        term = Uniform(codes, torch.rand(rows, 1).half(), torch.rand(rows, 1), rows, 33, 8, 33)
        layer = CompressedLinear(StoredLinear(CompressedTensor((term,))))
        before = layer.stored.tensors()
        after = layer.settle(rooms).stored.tensors()
        assert all(torch.equal(after[name], before[name]) for name in before)
        layers.append(after)
    tensors = [tensor for after in layers for tensor in after.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    places = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors)
    assert all(place % 64 == 0 for place, _ in places)
    assert all(place + size <= following for (place, size), (following, _) in pairwise(places))


def test_a_piece_that_is_full_is_followed_by_another():
    rooms, size = native.Rooms(), 3 * 2**20
    rooms_like = [rooms.like(torch.empty(size, dtype=torch.uint8, device="meta")) for _ in range(7)]
    for number, room in enumerate(rooms_like):
        room.fill_(number)
    assert [int(room.sum(dtype=torch.int64)) for room in rooms_like] == [number * size for number in range(7)]
