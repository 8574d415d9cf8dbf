"""Matrices that are looked at once: products after that are the same, wherever the tensors go and whichever kernels run."""

import copy
import gc
import weakref

import pytest
import torch

from fewbits.core.tensor import CompressedTensor
from fewbits.formats import coded
from fewbits.formats.dense import Dense
from fewbits.formats.lowrank import LowRank
from fewbits.formats.minifloat import E2M1, E4M3, Minifloat
from fewbits.formats.stepped import Stepped
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch, native

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


def uniform(scales=None) -> Uniform:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (48, 64), generator=generator)
    return Uniform.from_codes(
        codes, torch.rand(48, 2, generator=generator) + 0.1 if scales is None else scales, None, bits=4, group_size=32
    )


def assert_product_agrees(term, inputs):
    torch.testing.assert_close(term.matmul(inputs), inputs @ term.define().T, atol=1e-4, rtol=1e-4)


@pytest.fixture
def looks(monkeypatch):
    """Every time that a matrix was looked at, its instruction set."""
    found, look = [], native.Sums.__init__
    monkeypatch.setattr(native.Sums, "__init__", lambda self, isa, *rest: found.append(isa) or look(self, isa, *rest))
    return found


def test_a_term_is_looked_at_once_and_forgotten_with_it(looks):
    term, inputs, before = uniform(), torch.randn(3, 64), dispatch.counts["multiply"]
    for _ in range(3):
        assert_product_agrees(term, inputs)
    assert_product_agrees(term, torch.randn(64))
    assert looks == [native.chosen()] and dispatch.counts["multiply"] == before + 4
    kept = weakref.ref(dispatch._KEPT[term])
    del term
    gc.collect()
    assert kept() is None


def test_it_is_looked_at_again_where_its_memory_moved_or_other_kernels_were_asked_for(looks, monkeypatch):
    term, inputs = uniform(), torch.randn(2, 64)
    assert_product_agrees(term, inputs)
    term.codes.share_memory_()
    assert_product_agrees(term, inputs)
    assert len(looks) == 2
    monkeypatch.setenv("FEWBITS_FORCE_ISA", "scalar")
    assert_product_agrees(term, inputs)
    assert looks[2:] == ["scalar"]
    monkeypatch.setenv("FEWBITS_FORCE_ISA", "none")
    before = dispatch.counts["multiply"]
    assert_product_agrees(term, inputs)
    assert_product_agrees(copy.deepcopy(term), inputs)
    assert len(looks) == 3 and dispatch.counts["multiply"] == before


def test_a_sum_is_looked_at_once_and_forgotten_with_its_terms(looks):
    first, inputs = uniform(), torch.randn(2, 64)
    low_rank = LowRank(Dense(torch.randn(48, 4)), Dense(torch.randn(4, 64)))
    for others in ((low_rank,), (low_rank,), (low_rank, uniform()), (low_rank,)):
        weight = CompressedTensor((first, *others))
        torch.testing.assert_close(weight.matmul(inputs), inputs @ weight.decode().T, atol=1e-3, rtol=1e-4)
    assert len(looks) == 3  # the third sum begins with the same term, whose last sum is what is kept
    kept = weakref.ref(dispatch._KEPT[coded._KEPT[first][1]])
    del first, weight
    gc.collect()
    assert kept() is None


def test_numbers_of_minifloats_are_made_once(looks):
    for layout, scales in ((E4M3, "float"), (E2M1, "e8m0"), (E2M1, "e4m3")):
        term = Minifloat.round_to_nearest(torch.randn(48, 64), layout, block_size=32, scale_format=scales)
        assert_product_agrees(term, torch.randn(2, 64))
        assert_product_agrees(term, torch.randn(2, 64))
    assert looks == [native.chosen()] * 3


def test_what_is_made_anew_for_each_product_is_not_kept():
    scales = Dense((torch.rand(48, 2) + 0.1).half())  # another term, which is decoded for the kernel
    for term in (uniform(scales), Stepped.from_codes(torch.randint(4, (48, 64)), scales, None, bits=2, group_size=32)):
        assert_product_agrees(term, torch.randn(2, 64))
        assert_product_agrees(term, torch.randn(2, 64))
        assert dispatch._KEPT[term] is False


def test_gradients_and_other_inputs_take_the_way_they_did():
    term, asked = uniform(), torch.randn(2, 64, requires_grad=True)
    term.matmul(asked).sum().backward()
    assert torch.allclose(asked.grad, term.define().sum(0).expand(2, 64))
    assert_product_agrees(term, torch.randn(2, 64))
    term.scales.requires_grad_()
    assert term.matmul(torch.randn(2, 64)).requires_grad
    with torch.no_grad():
        assert_product_agrees(term, torch.randn(40, 64))  # more than a few vectors
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            term.matmul(torch.randn(2, 63))


def test_layouts_and_digits_that_are_wrong_are_refused():
    found = uniform().described()
    held, layout = native.buffers(found.tensors), (1, 0, *found.layout, 0)
    with pytest.raises(ValueError, match="a buffer is not of the size"):
        native._extension.Sums("scalar", layout, [held[0], held[1] - 1, *held[2:]], [64, 48])
    with pytest.raises(ValueError, match="a layout ends too early"):
        native._extension.Sums("scalar", layout[:-1], held, [64, 48])
    with pytest.raises(ValueError, match="a sum has other rows or columns"):
        native._extension.Sums("scalar", layout, held, [64, 47])
    with pytest.raises(ValueError, match="there must be columns"):
        native._extension.Sums("scalar", (), [], [])
    matrix, inputs, outputs = native._extension.Sums("scalar", layout, held, [64, 48]), torch.zeros(1, 64), torch.zeros(1, 48)
    for vectors, digits in ((-1, 3), (2**60, 3), (1, 0), (1, 4)):
        with pytest.raises(ValueError, match=r"out of range|1 to 3 digits"):
            matrix.multiply(inputs.data_ptr(), [outputs.data_ptr()], vectors, 0, 1, digits)
    with pytest.raises(ValueError, match="each sum has outputs"):
        matrix.multiply(inputs.data_ptr(), [], 1, 0, 1, 3)
    with pytest.raises(ValueError, match="32 columns, 64 would be right"):
        native.multiply("scalar", found.tensors, found.layout, torch.zeros(2, 32))
