"""Sums of terms in one call, on every instruction set, against the definitions' sum in float64; descriptions that lie are refused."""

import gc
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.additive import Additive
from fewbits.formats.binary import Binary
from fewbits.formats.codebook import Codebook
from fewbits.formats.dense import Dense
from fewbits.formats.lowrank import LowRank
from fewbits.formats.minifloat import E2M1, Minifloat
from fewbits.formats.mixed_groups import MixedGroups
from fewbits.formats.signed_product import SignedProduct
from fewbits.formats.sparse import Sparse
from fewbits.formats.stepped import Stepped
from fewbits.formats.ternary import Ternary
from fewbits.formats.uniform import Uniform
from fewbits.formats.unrounded import Unrounded
from fewbits.kernels import native, sums
from fewbits.kernels.dispatch import FEW_VECTORS, counts
from fewbits.kernels.layout import Description

# Of the sum over the terms of |input| times a row's largest |weight|, or of |input| |right| |left|: what sums of float32 products may be
# off by, and those of bfloat16 inputs, which have two digits in fixed point.
SUM_LIMIT = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 2**-12}
ROUNDED_TO = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of the whole sum, once
pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def codes(bits: int, *shape: int) -> Tensor:
    return torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(bits))


def uniform(rows: int, columns: int, bits: int = 4, group_size: int = 32) -> Uniform:
    scales = (sample(rows, -(-columns // group_size)).abs() + 0.1).half()
    return Uniform.from_codes(codes(bits, rows, columns), scales, codes(bits, *scales.shape), bits=bits, group_size=group_size)


def mixed(rows: int, columns: int) -> MixedGroups:
    groups = columns // 4
    chosen = torch.arange(groups).expand(rows, -1) < 1
    grid = [Dense((sample(rows, groups, seed=seed).abs() + 0.1).half()) for seed in (0, 1)]
    return MixedGroups.from_codes(codes(2, rows, columns).to(torch.uint8), chosen, *grid, widths=(2, 4), group_size=4)


TERMS = {
    "uniform": uniform,
    "uniform of whole rows": lambda rows, columns: uniform(rows, columns, 2, columns),
    "codebook": lambda rows, columns: Codebook.from_codes(codes(3, rows, columns), sample(1, 1, 8).half(), None, bits=3),
    "minifloat": lambda rows, columns: Minifloat.round_to_nearest(sample(rows, columns), E2M1, block_size=16, scale_format="e4m3"),
    "minimums": lambda rows, columns: Stepped.from_codes(
        codes(4, rows, columns), sample(rows, -(-columns // 8)).abs(), sample(rows, -(-columns // 8)), bits=4, group_size=8
    ),
    "signs": lambda rows, columns: Binary.from_signs(sample(rows, columns), sample(rows, 1).abs(), None, group_size=None),
    "ternary": lambda rows, columns: Ternary.from_signs(codes(1, rows, columns), sample(rows, 1).abs(), group_size=columns),
    "codewords": lambda rows, columns: Additive.from_codes(codes(5, rows, -(-columns // 8), 2), sample(2, 32, 8), columns=columns),
    "factors with signs": lambda rows, columns: SignedProduct.from_signs(sample(rows, columns), sample(rows, 3), sample(3, columns)),
    "groups of two widths": mixed,
    "sparse": lambda rows, columns: Sparse.from_dense(sample(rows, columns), sample(rows, columns, seed=1) > 1.5),
    "thin": lambda rows, columns: LowRank(Dense(sample(rows, 5).half()), Dense(sample(5, columns).half())),
    "thin of codes": lambda rows, columns: LowRank(uniform(rows, 24, 4, 8), uniform(24, columns, 8, columns)),
    "read unrounded": lambda rows, columns: Unrounded(LowRank(Dense(sample(rows, 2)), Dense(sample(2, columns)))),
}
MIXES = [
    ("uniform", "sparse"),
    ("uniform", "thin"),
    ("sparse", "uniform of whole rows", "thin of codes"),
    ("thin", "codebook", "thin of codes", "uniform", "uniform"),
    ("minifloat", "signs", "ternary", "read unrounded"),
    ("codewords", "sparse", "factors with signs"),
    ("groups of two widths", "thin"),
    ("minimums", "sparse", "thin", "uniform"),
]
SHAPES = ((33, 100), (7, 256), (130, 36))


def reach(term, inputs: Tensor) -> Tensor:
    """What rounding errors of a term are relative to: `[vectors, rows]`."""
    inner = term.inner if isinstance(term, Unrounded) else term
    if isinstance(inner, LowRank):
        return reach(inner.right, inputs) @ inner.left.decode().double().abs().T + reach(
            inner.left, inputs @ inner.right.decode().double().T
        )
    weight = inner.decode().double().abs()
    if isinstance(inner, Uniform):
        zeros = inner.unpacked_zero_points().abs() + 2**inner.bits_per_code
        weight = (zeros * inner.scales.float()).double().amax(1, keepdim=True).expand_as(weight)
    return inputs.double().abs() @ weight.amax(1, keepdim=True).expand_as(weight).T


def assert_agrees(terms, inputs: Tensor) -> None:
    before = counts.copy()
    found = CompressedTensor(terms).matmul(inputs)
    assert counts["multiply_sums"] == before["multiply_sums"] + 1 and counts["multiply"] == before["multiply"]
    assert found.dtype == inputs.dtype and found.shape == (*inputs.shape[:-1], terms[0].shape[0])
    expected = sum(inputs.double() @ term.decode().double().T for term in terms)
    limit = SUM_LIMIT[inputs.dtype] * sum(reach(term, inputs.double()) for term in terms)
    limit = limit + ROUNDED_TO[inputs.dtype] * (expected.abs() + limit) + torch.finfo(inputs.dtype).smallest_normal
    assert bool(((found.double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("names", MIXES, ids=" + ".join)
def test_sums_agree(isa, names):
    for (rows, columns), dtype in zip(SHAPES, ROUNDED_TO, strict=True):
        terms = tuple(TERMS[name](rows, columns) for name in names)
        for vectors in (1, 3, FEW_VECTORS):
            assert_agrees(terms, sample(vectors, columns).to(dtype))


@pytest.mark.parametrize("one", TERMS)
def test_any_two_terms_agree(isa, one):
    for two in list(TERMS)[::3]:
        assert_agrees((TERMS[one](40, 96), TERMS[two](40, 96)), sample(2, 1, 96))


def test_a_sum_is_rounded_once(isa):
    """Two terms that nearly cancel: what is left is as exact as the terms, where two rounded products would lose it."""
    weight = torch.full((4, 64), 257.0)
    terms = (Dense(weight), Dense(-weight + 1))
    pair = tuple(LowRank(term, Dense(torch.eye(64))) for term in terms)
    inputs = torch.ones(1, 64, dtype=torch.bfloat16)
    assert torch.equal(CompressedTensor(pair).matmul(inputs), torch.full((1, 4), 64.0, dtype=torch.bfloat16))
    assert not torch.equal(sum(term.matmul(inputs) for term in pair), torch.full((1, 4), 64.0, dtype=torch.bfloat16))


def test_threads_change_nothing(isa, on_threads):
    terms = tuple(TERMS[name](700, 96) for name in ("uniform", "sparse", "thin", "thin of codes"))
    for vectors in (1, 5):
        found = on_threads(lambda vectors=vectors: CompressedTensor(terms).matmul(sample(vectors, 96)))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def entries(rows: int, columns: int, dtype: torch.dtype) -> Sparse:
    """Rows with hardly any entries, with some, and one each without any, with more than 64, and with all."""
    share = torch.where(torch.arange(rows) % 3 == 0, 40 / columns, 0.01)
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) < share[:, None]
    mask[rows // 2] = False
    mask[rows // 3, : columns // 4] = True
    mask[-1] = True
    return Sparse.from_dense(sample(rows, columns), mask, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 40), (17, 1300), (50, 320), (9, 33000)])
def test_entries_of_any_rows_are_added(isa, dtype, rows, columns):
    term = entries(rows, columns, dtype)
    assert term.column_indices.dtype == (torch.int16 if columns < 2**15 else torch.int32)
    for vectors, given_dtype in ((1, torch.bfloat16), (1, torch.float32), (2, torch.float16), (7, torch.bfloat16), (17, torch.float32)):
        assert_agrees((uniform(rows, columns), term), sample(vectors, columns).to(given_dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 16, 32, 37, 128, 600])
def test_thin_factors_of_any_rank_are_added(isa, dtype, rank):
    for (rows, columns), (vectors, given_dtype) in zip(
        ((1, 40), (35, 1300), (64, 96), (50, 560)),
        ((1, torch.bfloat16), (1, torch.float32), (1, torch.float16), (5, torch.bfloat16)),
        strict=True,
    ):
        thin = LowRank(Dense(sample(rows, rank).to(dtype)), Dense((sample(rank, columns) / rank).to(dtype)))
        assert_agrees((uniform(rows, columns), thin), sample(vectors, columns).to(given_dtype))
        assert_agrees((thin, uniform(rows, columns), thin), sample(vectors, columns).to(given_dtype))


def test_threads_change_nothing_of_what_is_added(isa, on_threads):
    terms = (uniform(1100, 320), entries(1100, 320, torch.float16), LowRank(Dense(sample(1100, 32).half()), Dense(sample(32, 320).half())))
    for vectors in (1, 6):
        for some in (terms, terms[:2], terms[::2]):
            found = on_threads(lambda some=some, vectors=vectors: CompressedTensor(some).matmul(sample(vectors, 320).bfloat16()))
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("place", [0, 500, -1])
def test_entries_outside_are_refused_wherever_they_are(isa, vectors, place):
    rows, columns = 40, 1300
    good, inputs = entries(rows, columns, torch.float16), sample(vectors, columns).bfloat16()
    for wrong in (columns, -1):
        indices = good.column_indices.clone()
        indices[place] = wrong
        with pytest.raises(ValueError, match="outside of it"):
            CompressedTensor((uniform(rows, columns), Sparse(good.values, indices, good.row_pointers, columns))).matmul(inputs)
    for wrong in (-1, good.values.numel() + 1):
        pointers = good.row_pointers.clone()
        pointers[place % rows] = wrong
        with pytest.raises(ValueError, match="outside of it"):
            CompressedTensor((uniform(rows, columns), Sparse(good.values, good.column_indices, pointers, columns))).matmul(inputs)


def test_several_sums_of_the_same_inputs(isa):
    shapes = (60, 8, 8)
    several = [[(uniform(rows, 96).described(),), *([TERMS["thin"](rows, 96).factors()] if rows == 60 else [])] for rows in shapes]
    biases = [sample(rows).half() for rows in shapes]
    described = [sums.describe_sum(terms, [bias]) for terms, bias in zip(several, biases, strict=True)]
    for vectors in (1, 6):
        inputs = sample(vectors, 96)
        found = sums.multiply_sums(described, list(shapes), inputs)
        for rows, bias, outputs in zip(shapes, biases, found, strict=True):
            terms = (uniform(rows, 96), *([TERMS["thin"](rows, 96)] if rows == 60 else []))
            torch.testing.assert_close(outputs, CompressedTensor(terms).matmul(inputs) + bias.float(), rtol=1e-6, atol=1e-5)


def test_who_adds_up(monkeypatch):
    """Products one by one: of many vectors, where gradients are asked for, of a term that is not described, and without kernels."""
    terms, inputs = (uniform(8, 64), TERMS["sparse"](8, 64)), sample(2, 64)
    stepped = Stepped.from_codes(codes(4, 8, 64), sample(8, 2).abs(), sample(8, 2).double(), bits=4, group_size=32)
    cases = {
        "many": (terms, sample(FEW_VECTORS + 1, 64)),
        "gradients": (terms, inputs.clone().requires_grad_()),
        "minimums of float64": ((*terms, stepped), inputs),
        "plain numbers": ((*terms, Dense(sample(8, 64))), inputs),
        "float64": (terms, inputs.double()),
    }
    for name, (some, given_inputs) in cases.items():
        before = counts["multiply_sums"]
        found = CompressedTensor(some).matmul(given_inputs)
        assert counts["multiply_sums"] == before, name
        torch.testing.assert_close(found.float(), given_inputs.float() @ CompressedTensor(some).decode().T, rtol=1e-4, atol=1e-3)
    monkeypatch.setenv("FEWBITS_FORCE_ISA", "none")
    before = counts["multiply_sums"]
    torch.testing.assert_close(CompressedTensor(terms).matmul(inputs), inputs @ CompressedTensor(terms).decode().T, rtol=1e-4, atol=1e-3)
    assert counts["multiply_sums"] == before
    with pytest.raises(RuntimeError, match="shapes"):
        CompressedTensor(terms).matmul(sample(2, 63))


def test_what_is_kept_is_seen_when_numbers_change_and_goes_with_its_terms():
    first, second, third = uniform(8, 64), TERMS["sparse"](8, 64), TERMS["thin"](8, 64)
    inputs = sample(2, 64)
    for others in ((second,), (third,), (second, third), (second,)):
        weight = CompressedTensor((first, *others))
        torch.testing.assert_close(weight.matmul(inputs), inputs @ weight.decode().T, rtol=1e-4, atol=1e-3)
    second.values.mul_(2)
    first.scales.mul_(0.5)
    weight = CompressedTensor((first, second))
    torch.testing.assert_close(weight.matmul(inputs), inputs @ weight.decode().T, rtol=1e-4, atol=1e-3)
    made_anew = TERMS["minifloat"](8, 64)  # whose table of scales is made for each product
    weight = CompressedTensor((made_anew, second))
    weight.matmul(inputs)
    made_anew.scales.fill_(56)
    torch.testing.assert_close(weight.matmul(inputs), inputs @ weight.decode().T, rtol=1e-4, atol=1e-3)
    gone = weakref.ref(first)
    del first, weight
    gc.collect()
    assert gone() is None


def test_a_quantizer_rounds_what_most_terms_read():
    terms = (uniform(8, 64), TERMS["read unrounded"](8, 64), TERMS["sparse"](8, 64), TERMS["read unrounded"](8, 64))
    inputs, before = sample(2, 64), counts["multiply_sums"]
    found = CompressedTensor(terms).matmul(inputs, torch.round)
    expected = sum((inputs if term.reads_unrounded else inputs.round()) @ term.decode().T for term in terms)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert counts["multiply_sums"] == before + 2


def test_a_compiled_sum_is_one_graph_and_runs_the_kernel():
    weight = CompressedTensor((uniform(12, 64), TERMS["sparse"](12, 64), TERMS["thin"](12, 64)))
    compiled, inputs = torch.compile(weight.matmul, fullgraph=True, backend="aot_eager"), sample(3, 64)
    before = counts["multiply_sums"]
    with torch.no_grad():
        assert torch.equal(compiled(inputs), weight.matmul(inputs))
    assert counts["multiply_sums"] == before + 2
    described = sums.describe_sum([(uniform(12, 64).described(),)])
    arguments = (inputs, list(described.tensors), list(described.layout), [12])
    checks = ("test_schema", "test_faketensor")
    assert torch.library.opcheck(torch.ops.fewbits.multiply_sums.default, arguments, test_utils=checks) == dict.fromkeys(checks, "SUCCESS")


@pytest.mark.parametrize(("name", "place"), [("sparse", 0), ("sparse", 1), ("codewords", 0), ("codewords", 1)])
def test_a_matrix_that_points_outside_of_itself_is_an_error(isa, name, place):
    broken = TERMS[name](8, 96)
    tensor = broken.column_indices if name == "sparse" else broken.codes
    if name == "sparse":
        tensor[3] = 97
    else:
        broken = Additive(broken.codes, broken.codebooks[:, :20].contiguous(), None, 8, 96)
        tensor.fill_(255)
    terms = [uniform(8, 96), uniform(8, 96)]
    terms[place] = broken
    with pytest.raises(ValueError, match=r"outside of it|no codeword"):
        CompressedTensor(tuple(terms)).matmul(sample(1, 96))


sizes = st.one_of(st.integers(-2, 300), st.sampled_from([2**16, 2**31 - 1, 2**40, 2**40 + 1, -(2**40)]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_sizes_that_lie_are_refused_or_stay_inside(isa, data):
    terms = [TERMS[name](12, 96).factors() for name in ("thin", "uniform", "sparse")]
    described = sums.describe_sum(terms, [sample(12)])
    told, tensors, rows = list(described.layout), list(described.tensors), [12]
    for place in data.draw(st.lists(st.integers(0, len(told) - 1), max_size=2)):
        told[place] = data.draw(sizes)
    for place in data.draw(st.lists(st.integers(0, len(tensors) - 1), max_size=1)):
        flat = tensors[place].flatten()
        tensors[place] = flat[: data.draw(st.integers(0, flat.numel()))].clone()
    rows[0] = data.draw(st.sampled_from([12, 12, 13]))
    inputs = torch.ones(data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from([96, 96, 95])))
    try:
        found = native.Sums(isa, tensors, told, inputs.shape[1], rows, len(inputs)).multiply(inputs)
    except (ValueError, TypeError, OverflowError):
        return
    assert found[0].shape == (len(inputs), 12) and inputs.shape[1] == 96


def test_layouts_that_lie_are_refused_by_name(isa):
    thin, grid = TERMS["thin"](12, 96).factors(), (uniform(12, 96).described(),)
    other = (uniform(13, 96).described(),)
    told = {
        "terms of different shapes cannot be added": [sums.describe_sum([grid, other])],
        "the factors of a term cannot be multiplied": [sums.describe_sum([(thin[0], grid[0])])],
        "a sum has other rows or columns": [sums.describe_sum([other])],
        "a layout describes less": [sums.describe_sum([grid]), sums.describe_sum([grid])],
        "a layout ends too early": [Description(grid[0].tensors, (2, 0, *grid[0].layout))],
    }
    for words, several in told.items():
        tensors, layout = [tensor for one in several for tensor in one.tensors], [size for one in several for size in one.layout]
        with pytest.raises(ValueError, match=words):
            native.Sums(isa, tensors, layout, 96, [12], 1)
