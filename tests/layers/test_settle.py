"""Layers whose stored tensors move to memory that kernels read fast."""

import copy
from itertools import pairwise

import pytest
import torch

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.additive import Additive
from fewbits.formats.lines import Lines
from fewbits.formats.signed_product import SignedProduct
from fewbits.formats.sparse import Sparse
from fewbits.formats.uniform import Uniform
from fewbits.kernels import native
from fewbits.layers.conv import CompressedConv2d, StoredConv2d
from fewbits.layers.embedding import CompressedEmbedding, TiedHead
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


@pytest.fixture(params=["avx512vnni", "avx2"])
def in_lines(request, monkeypatch):
    """A layer some of whose terms lie in lines, and the same layer before that; with each instruction set that reads lines."""
    if request.param not in native.available():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("FEWBITS_FORCE_ISA", request.param)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (64, 96), generator=generator)
    terms = (
        Uniform.from_codes(codes, torch.rand(64, 3, generator=generator).half(), torch.randint(16, (64, 3)), bits=4, group_size=32),
        Sparse.from_dense(torch.randn(64, 96, generator=generator), torch.rand(64, 96, generator=generator) < 0.05),
    )
    stored = StoredLinear(CompressedTensor(terms))
    return CompressedLinear(stored, torch.randn(64)).settle(native.Rooms()), stored


def test_a_layer_in_lines_computes_and_stores_what_it_did(in_lines):
    layer, stored = in_lines
    assert isinstance(layer.laid.weight.terms[0], Lines) and layer.laid.weight.terms[1].kind == "sparse"
    assert layer.stored.settings() == stored.settings() and layer.laid is layer.laid
    tensors = layer.stored.tensors()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in stored.tensors().items())
    assert sum(layer.laid.bits().values()) == sum(stored.bits().values())
    inputs = torch.randn(3, 96)
    torch.testing.assert_close(layer(inputs), inputs @ stored.weight.decode().T + layer.bias, atol=1e-4, rtol=1e-5)
    assert torch.equal(layer.weight, stored.weight.decode())


def test_what_is_saved_of_a_layer_in_lines_lies_by_rows_and_is_loaded_so(in_lines):
    layer, stored = in_lines
    plain = CompressedLinear(stored, layer.bias.data)
    saved, expected = layer.state_dict(), plain.state_dict()
    assert list(saved) == list(expected) and all(torch.equal(saved[name], expected[name]) for name in expected)
    other = CompressedLinear(StoredLinear(stored.weight.taken(torch.arange(63, -1, -1))), layer.bias.data)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.settle(native.Rooms()).weight, other.weight)


def test_a_layer_in_lines_is_copied_cast_and_moved(in_lines):
    layer, stored = in_lines
    copied = copy.deepcopy(layer).bfloat16()
    assert isinstance(copied.laid.weight.terms[0], Lines) and torch.equal(copied.weight, stored.weight.decode())
    moved = copy.deepcopy(layer).to("meta")
    assert moved.stored.settings() == stored.settings() and not isinstance(moved.laid.weight.terms[0], Lines)


def test_an_embedding_in_lines_gives_its_rows(in_lines):
    _, stored = in_lines
    stored = StoredLinear(CompressedTensor(stored.weight.terms[:1]))
    table = CompressedEmbedding(stored).settle(native.Rooms())
    tokens, weight = torch.tensor([[5, 0], [63, 17]]), stored.weight.decode()
    assert isinstance(table.laid.weight.terms[0], Lines) and torch.equal(table(tokens), weight[tokens])
    inputs = torch.randn(2, 96)
    torch.testing.assert_close(TiedHead(table)(inputs), inputs @ weight.T, atol=1e-4, rtol=1e-5)


def settled_codewords(rows: int = 320) -> tuple[Additive, CompressedLinear]:
    """Codewords of which kernels may make tables, and the layer of them, settled."""
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(256, (rows, 12, 2), generator=generator)
    term = Additive.from_codes(codes, torch.randn(2, 256, 8, generator=generator).half(), torch.rand(rows, 1, generator=generator).half())
    return term, CompressedLinear(StoredLinear(CompressedTensor((term,)))).settle()


def test_codewords_are_laid_in_lines_where_kernels_make_tables_and_stored_by_rows():
    term, layer = settled_codewords()
    laid, stored = layer.laid.weight.terms[0], layer.stored.weight.terms[0]
    assert isinstance(laid, Additive) and isinstance(stored, Additive)
    assert laid.lines == (native.chosen() == "avx512vnni") and not stored.lines
    assert torch.equal(laid.decode(), term.decode()) and torch.equal(stored.codes, term.codes)
    assert torch.equal(layer.state_dict()["weight__terms__0__codes"], term.codes)
    inputs = torch.randn(2, 96)
    torch.testing.assert_close(layer(inputs), term.matmul(inputs), rtol=1e-4, atol=1e-4)


def test_codewords_that_are_loaded_into_a_settled_layer_are_those_that_it_holds():
    (term, layer), (_, other) = settled_codewords(), settled_codewords(384)
    fresh = CompressedLinear(other.stored)
    other.load_state_dict(fresh.state_dict())
    assert torch.equal(other.stored.weight.decode(), fresh.stored.weight.decode())
    assert torch.equal(layer.weight, term.decode())


def test_signs_of_factors_are_laid_in_lines_where_kernels_make_tables_and_stored_by_rows():
    generator = torch.Generator().manual_seed(0)
    shapes = ((320, 96), (320, 4), (4, 96))
    terms = tuple(SignedProduct.from_signs(*(torch.randn(*shape, generator=generator) for shape in shapes)) for _ in range(2))
    plain = CompressedLinear(StoredLinear(CompressedTensor(terms)))
    layer = CompressedLinear(plain.stored).settle(native.Rooms())
    assert all(term.lines == (native.chosen() == "avx512vnni") for term in layer.laid.weight.terms)
    assert layer.stored.settings() == plain.stored.settings() and torch.equal(layer.weight, plain.weight)
    saved, expected = layer.state_dict(), plain.state_dict()
    assert list(saved) == list(expected) and all(torch.equal(saved[name], expected[name]) for name in expected)
    layer.load_state_dict(expected)
    assert not any(term.lines for term in layer.laid.weight.terms)
    layer.settle(native.Rooms())
    copied, moved = copy.deepcopy(layer).bfloat16(), copy.deepcopy(layer).to("meta")
    assert torch.equal(copied.weight, plain.weight) and not any(term.lines for term in moved.laid.weight.terms)
    inputs = torch.randn(2, 96)
    torch.testing.assert_close(layer(inputs), plain(inputs), rtol=1e-4, atol=1e-3)


def test_few_rows_of_codewords_stay_as_they_are():
    _, layer = settled_codewords(192)
    assert not layer.laid.weight.terms[0].lines


def test_filters_which_are_decoded_at_each_call_stay_by_rows(in_lines):
    _, stored = in_lines
    filters = StoredConv2d(CompressedTensor(stored.weight.terms[:1]), (1, 3))
    layer = CompressedConv2d(filters).settle(native.Rooms())
    assert layer.laid is layer.stored and not isinstance(layer.laid.weight.terms[0], Lines)


@pytest.mark.slow
def test_a_layer_in_lines_is_compiled_to_one_graph(in_lines):
    layer, _ = in_lines
    inputs = torch.randn(3, 96)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(inputs), layer(inputs), atol=1e-4, rtol=1e-5)
