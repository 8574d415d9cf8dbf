"""Rotations and other orders of features by kernels, on every instruction set, against the torch definitions."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.permutation import PackedPermutation, Permutation
from fewbits.formats.rotation import Hadamard
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch, native
from fewbits.layers.linear import CompressedLinear, StoredLinear

# Of the vector's length: what sums in log2(size) steps of float32 may be off by, plus the output's own rounding.
ROTATION_LIMIT = {torch.float32: 5e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}
pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
SIZES = [1, 2, 4, 8, 16, 32, 64, 1024, 12, 24, 48, 96, 192, 20, 40, 160, 640, 28, 56, 448]


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotations(size: int) -> list[Hadamard]:
    signed = Hadamard.random(size, torch.Generator().manual_seed(size))
    return [one for rotation in (Hadamard(size), signed) for one in (rotation, rotation.transpose())]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", list(ROTATION_LIMIT))
def test_rotations_agree(isa, size, dtype):
    vectors = sample(3, 2, size, seed=size).to(dtype)
    for rotation in rotations(size):
        before = dispatch.counts["rotate"]
        found = rotation.apply(vectors)
        assert dispatch.counts["rotate"] == before + 1 and found.dtype == dtype and found.shape == vectors.shape
        expected = rotation.define(vectors.double())
        length = vectors.double().norm(dim=-1, keepdim=True)
        limit = ROTATION_LIMIT[torch.float32] * length + (ROTATION_LIMIT[dtype] * expected.abs() if dtype != torch.float32 else 0)
        assert bool(((found.double() - expected).abs() <= limit + torch.finfo(dtype).smallest_normal).all())


@pytest.mark.parametrize("size", [size for size in SIZES if size & (size - 1) == 0])
def test_a_power_of_two_in_float32_is_bit_for_bit_the_definition(isa, size):
    vectors = sample(5, size, seed=1) * 10 ** sample(5, size, seed=2)
    for rotation in rotations(size):
        assert torch.equal(rotation.apply(vectors), rotation.define(vectors))


@pytest.mark.parametrize("size", [96, 256])
def test_a_rotation_is_undone_by_its_transpose_and_keeps_lengths(isa, size):
    vectors = sample(4, size, seed=3)
    for rotation in rotations(size):
        turned = rotation.apply(vectors)
        torch.testing.assert_close(rotation.transpose().apply(turned), vectors)
        torch.testing.assert_close(turned.norm(dim=-1), vectors.norm(dim=-1))


@given(features=st.integers(1, 700), rows=st.integers(0, 5), dtype=st.sampled_from(list(ROTATION_LIMIT)), seed=st.integers(0, 99))
def test_other_orders_are_those_of_the_definition(features, rows, dtype, seed):
    order = torch.randperm(features, generator=torch.Generator().manual_seed(seed))
    vectors = sample(rows, features, seed=seed).to(dtype)
    for transform in (Permutation.from_order(order), Permutation(order), Permutation(order.int()), PackedPermutation.from_order(order)):
        before = dispatch.counts["reorder"]
        assert torch.equal(transform.apply(vectors), vectors[:, order])
        assert dispatch.counts["reorder"] == before + (rows > 0)


def test_orders_of_more_features_than_16_bits_name_and_many_vectors():
    order = torch.randperm(70000, generator=torch.Generator().manual_seed(0))
    vectors = sample(3, 70000)
    for transform in (Permutation.from_order(order), PackedPermutation.from_order(order)):
        assert torch.equal(transform.apply(vectors), vectors[:, order])
        assert torch.equal(transform.inverse().apply(transform.apply(vectors)), vectors)


def test_other_numbers_gradients_and_wrong_sizes_take_the_definition(isa):
    rotation, order = Hadamard(8), Permutation(torch.tensor([2, 0, 1, 3, 4, 5, 6, 7]))
    before = dispatch.counts["rotate"] + dispatch.counts["reorder"]
    wide = sample(2, 8).double()
    assert torch.equal(rotation.apply(wide), rotation.define(wide)) and torch.equal(order.apply(wide), wide[:, order.order])
    asked = sample(2, 8).requires_grad_()
    (rotation.apply(asked) + order.apply(asked)).sum().backward()
    assert asked.grad is not None and dispatch.counts["rotate"] + dispatch.counts["reorder"] == before
    with pytest.raises(IndexError):
        order.apply(sample(2, 5))


def test_vectors_that_do_not_lie_one_after_the_other(isa):
    matrix, rotation = sample(64, 6), Hadamard.random(64, torch.Generator().manual_seed(1))
    assert torch.equal(rotation.apply(matrix.T), rotation.apply(matrix.T.contiguous()))
    order = Permutation.from_order(torch.randperm(64, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(order.apply(matrix.T), matrix[order.order.long()].T)


def test_a_compiled_layer_with_transforms_is_one_graph():
    codes, scales = torch.randint(16, (12, 64), generator=torch.Generator().manual_seed(0)), torch.rand(12, 4).half() + 0.1
    term = Uniform.from_codes(codes, scales, None, bits=4, group_size=16)
    order = PackedPermutation.from_order(torch.randperm(64, generator=torch.Generator().manual_seed(3)))
    weight = CompressedTensor((term,), (order, Hadamard.random(64, torch.Generator().manual_seed(4))))
    layer = CompressedLinear(StoredLinear(weight))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        inputs, before = sample(3, 64), dispatch.counts.copy()
        torch.testing.assert_close(compiled(inputs), layer(inputs))
    assert all(dispatch.counts[name] == before[name] + 2 for name in ("rotate", "reorder", "multiply"))


def test_the_operators_pass_torchs_checks():
    checks, order = ("test_schema", "test_faketensor"), torch.arange(8, dtype=torch.int16).flip(0).view(torch.uint8)
    signs = torch.tensor([[5]], dtype=torch.uint8)
    found = [
        torch.library.opcheck(torch.ops.fewbits.rotate.default, (sample(2, 8), 1, signs, None, True), test_utils=checks),
        torch.library.opcheck(torch.ops.fewbits.reorder.default, (sample(2, 3, 8), order, 16), test_utils=checks),
    ]
    assert found == [dict.fromkeys(checks, "SUCCESS")] * 2


def test_an_order_that_points_outside_is_refused():
    order = torch.tensor([1, 0, 3], dtype=torch.int16).view(torch.uint8)
    with pytest.raises(ValueError, match="an order names a feature that there is not"):
        native.reorder(sample(2, 3), order, 16)


def _calls(isa: str) -> dict[str, tuple]:
    """Functions of the module with sizes and buffers that are right."""
    vectors, packed = sample(2, 24), torch.zeros(30, dtype=torch.uint8)
    rotated = ([2, 24, 0, 12, 0, 1], [vectors, vectors.clone(), packed[:3], torch.ones(12, 12)])
    return {
        "rotate": (lambda *given: native._extension.rotate(isa, *given, 1), *rotated),
        "reorder": (lambda *given: native._extension.reorder(*given, 1), [2, 24, 4, 10], [vectors, vectors.clone(), packed]),
        "transpose_blocks": (lambda *given: native._extension.transpose_blocks(*given, 1), [3, 4, 4, 4], [vectors, vectors.clone()]),
    }


@pytest.mark.parametrize("name", ["rotate", "reorder", "transpose_blocks"])
def test_every_size_and_buffer_that_is_wrong_is_refused(isa, name):
    function, sizes, held = _calls(isa)[name]
    function(sizes, native.buffers(held))
    for place in range(len(sizes)):
        for wrong in (-1, 2**40 + 1):
            with pytest.raises(ValueError, match="a size in a layout is out of range"):
                function([*sizes[:place], wrong, *sizes[place + 1 :]], native.buffers(held))
    for place, tensor in enumerate(held):
        short = [*held[:place], tensor.flatten()[:-1].clone(), *held[place + 1 :]]
        with pytest.raises(ValueError, match="a buffer is not of the size that its layout says"):
            function(sizes, native.buffers(short))
    with pytest.raises(ValueError, match="a layout needs more buffers than were given"):
        function(sizes, native.buffers(held[:-1]))
    with pytest.raises(ValueError, match="a layout describes less than was given"):
        function(sizes, native.buffers([*held, held[0]]))


@pytest.mark.parametrize("name", ["rotate", "reorder"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(data=st.data())
def test_sizes_that_lie_are_refused_or_stay_inside(isa, name, data):
    function, sizes, held = _calls(isa)[name]
    for place in data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=3)):
        sizes[place] = data.draw(st.one_of(st.integers(0, 100), st.sampled_from([2**16, 2**31, 2**40])))
    cut = data.draw(st.integers(0, len(held)))
    buffers = [tensor.flatten()[: data.draw(st.integers(0, tensor.numel())) if place == cut else None] for place, tensor in enumerate(held)]
    held = [buffer.clone() for buffer in buffers]  # whose memory ends with them
    try:
        function(sizes, native.buffers(held))
    except ValueError:
        return
    assert sizes[0] * sizes[1] * (4 if name == "rotate" and sizes[2] == 0 else 2 if name == "rotate" else sizes[2]) == held[0].nbytes
