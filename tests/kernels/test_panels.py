"""Products of many vectors, on every instruction set, against the torch definition in float64: panels where there are some."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.core.tensor import CompressedTensor
from fewbits.formats.binary import Binary
from fewbits.formats.codebook import Codebook
from fewbits.formats.coded import Coded
from fewbits.formats.minifloat import E2M1, E4M3, Minifloat
from fewbits.formats.ternary import Ternary
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch, native
from fewbits.layers.linear import CompressedLinear, StoredLinear

# Of the sum of |input| times the row's largest |code * scale| + |zero * scale|: what sums of float32 products may be off by.
FLOAT32_LIMIT = 1e-6
# Of the sum of |input * weight|: what weights that are rounded to the inputs' type, as the definition rounds them, may be off by.
PANEL_LIMIT = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}
ROUNDED_TO = PANEL_LIMIT  # of the product: the output's own rounding
# Of the largest |input| times that |code * scale| + |zero * scale|, for each square root of a column: inputs of 8 bits.
DIGITS_LIMIT = 2**-5

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
SHAPES = {
    "rows": st.one_of(st.integers(1, 20), st.integers(30, 140)),
    "columns": st.one_of(st.integers(1, 300), st.integers(500, 1300)),
    "group_size": st.one_of(st.none(), st.sampled_from([4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 512, 768]), st.integers(1, 400)),
    "vectors": st.one_of(st.integers(33, 60), st.sampled_from([128, 600])),
    "seed": st.integers(0, 10**6),
}


def sample(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(bits: int, shape: tuple[int, int], group_size: int | None, zeros: str, dtype=torch.float16, seed: int = 0) -> Uniform:
    generator, groups = sample(seed), -(-shape[1] // (group_size or shape[1]))
    codes = torch.randint(2**bits, shape, generator=generator)
    scales = (torch.rand(1 if zeros == "shared" else shape[0], groups, generator=generator) + 0.1).to(dtype)
    zero_points = {"integer": torch.randint(2**bits, (shape[0], groups), generator=generator)}
    zero_points["real"] = (torch.randn(shape[0], groups, generator=generator) * 2**bits).to(dtype)
    return Uniform.from_codes(codes, scales, zero_points.get(zeros), bits=bits, group_size=group_size)


def reach(term: Coded) -> Tensor:
    """The largest |code * scale| + |zero * scale| of each row, `[rows]`."""
    if not isinstance(term, Uniform):
        return term.define(torch.float64).abs().amax(1)
    scales = term.scales.decode() if isinstance(term.scales, Coded) else term.scales.float()
    found = (2**term.bits_per_code - 1 + term.unpacked_zero_points().abs()) * scales.abs()
    return found.amax(1).double().expand(term.rows)


def errors(term: Coded, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What a product is off by, and the limit for inputs as they are."""
    before = dispatch.counts["definition"]
    found = term.matmul(inputs)
    assert dispatch.counts["definition"] == before and found.dtype == inputs.dtype and found.shape == (len(inputs), term.shape[0])
    weight, absolute = term.define(torch.float64), inputs.double().abs()
    expected = inputs.double() @ weight.T
    limit = FLOAT32_LIMIT * absolute.sum(1, keepdim=True) * reach(term) + PANEL_LIMIT[inputs.dtype] * (absolute @ weight.abs().T)
    limit = limit + ROUNDED_TO[inputs.dtype] * (expected.abs() + limit) + torch.finfo(inputs.dtype).smallest_normal
    return (found.double() - expected).abs(), limit


def assert_agrees(term: Coded, inputs: Tensor) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in native.available():
            patch.setenv("FEWBITS_FORCE_ISA", name)
            error, limit = errors(term, inputs)
            assert bool((error <= limit).all()), name


@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(1, 8),
    zeros=st.sampled_from(["symmetric", "shared", "integer", "real"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    input_dtype=st.sampled_from(list(ROUNDED_TO)),
    shape=st.fixed_dictionaries(SHAPES),
)
def test_uniform_products_of_any_shape_agree(bits, zeros, dtype, input_dtype, shape):
    rows, columns, group_size, vectors, seed = (shape[name] for name in SHAPES)
    term = uniform(bits, (rows, columns), group_size, zeros, dtype, seed)
    assert_agrees(term, torch.randn(vectors, columns, generator=sample(seed)).to(input_dtype))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns, group_size", [(700, None), (1100, 512), (390, 128), (1290, 32), (130, 16), (250, 24), (72, 4), (70, 5)])
def test_every_width_meets_every_grid(isa, bits, columns, group_size):
    for rows, zeros, vectors in ((1, "symmetric", 33), (45, "integer", 50), (97, "real", 64)):
        inputs = torch.randn(vectors, columns, generator=sample(1))
        for dtype in (torch.float32, torch.bfloat16):
            error, limit = errors(uniform(bits, (rows, columns), group_size, zeros), inputs.to(dtype))
            assert bool((error <= limit).all())


@pytest.mark.parametrize("columns, group_size", [(2050, None), (2100, 1024), (2100, 768), (390, 128), (1290, 32), (250, 24), (72, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_of_8_bits_keep_their_limit(isa, columns, group_size, dtype, monkeypatch):
    monkeypatch.setenv("FEWBITS_INPUT_DIGITS", "1")
    for bits in range(1, 9):
        for rows, zeros, vectors in ((1, "symmetric", 33), (45, "integer", 50), (70, "real", 40)):
            inputs = torch.randn(vectors, columns, generator=sample(1)).to(dtype)
            term = uniform(bits, (rows, columns), group_size, zeros)
            error, limit = errors(term, inputs)
            rounded = DIGITS_LIMIT * columns**0.5 * inputs.double().abs().amax(1, keepdim=True) * reach(term)
            assert bool((error <= limit + rounded).all())
            takes_bytes = isa == "avx512vnni" and (group_size is None or group_size % 4 == 0)
            assert bool((error > limit).any()) == takes_bytes or dtype == torch.bfloat16


@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(1, 8),
    level_rows=st.booleans(),
    level_groups=st.booleans(),
    scaled=st.booleans(),
    input_dtype=st.sampled_from(list(ROUNDED_TO)),
    shape=st.fixed_dictionaries(SHAPES),
)
def test_codebook_products_agree(bits, level_rows, level_groups, scaled, input_dtype, shape):
    rows, columns, group_size, vectors, seed = (shape[name] for name in SHAPES)
    generator, groups = sample(seed), -(-columns // (group_size or columns))
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    levels = torch.randn(rows if level_rows else 1, groups if level_groups else 1, 2**bits, generator=generator).half()
    scales = torch.rand(rows, groups, generator=generator).half() if scaled else None
    term = Codebook.from_codes(codes, levels, scales, bits=bits, group_size=group_size)
    assert_agrees(term, torch.randn(vectors, columns, generator=generator).to(input_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("digits", ["1", "3"])
def test_other_terms_of_codes_agree(isa, dtype, digits, monkeypatch):
    monkeypatch.setenv("FEWBITS_INPUT_DIGITS", digits)
    generator = sample(0)
    weight = torch.randn(37, 320, generator=generator)
    scales, offsets = torch.rand(37, 10, generator=generator).half() + 0.1, torch.randn(37, 10, generator=generator).half()
    second = uniform(6, (37, 10), 5, "integer", seed=1)
    terms = [
        Binary.from_signs(weight, scales, offsets, group_size=32),
        Binary.from_signs(weight, scales, None, group_size=32),
        Binary.from_signs(weight, None, None),
        Ternary.from_signs(weight.sign().to(torch.int64), scales, group_size=32),
        Minifloat.round_to_nearest(weight, E2M1, block_size=32, scale_format="e8m0"),
        Minifloat.round_to_nearest(weight, E4M3, block_size=16, scale_format="e4m3"),
        Uniform.from_codes(torch.randint(8, (37, 320), generator=generator), second, None, bits=3, group_size=32),
    ]
    inputs = torch.randn(50, 320, generator=generator).to(dtype)
    for term in terms:
        error, limit = errors(term, inputs)
        if digits == "1":
            limit = limit + DIGITS_LIMIT * 320**0.5 * inputs.double().abs().amax(1, keepdim=True) * reach(term)
        assert bool((error <= limit).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("digits", ["1", "3"])
def test_a_vector_that_is_not_finite_spoils_its_own_outputs_alone(isa, dtype, digits, monkeypatch):
    monkeypatch.setenv("FEWBITS_INPUT_DIGITS", digits)
    inputs = torch.randn(40, 300, generator=sample(0)).to(dtype)
    inputs[3, 299], inputs[17, 0], inputs[39, 130] = torch.inf, torch.nan, -torch.inf
    found = torch.isfinite(uniform(4, (45, 300), 20, "integer").matmul(inputs))
    spoilt = torch.zeros(40, dtype=torch.bool).index_fill(0, torch.tensor([3, 17, 39]), True)
    assert not found[spoilt].any() and found[~spoilt].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("digits", ["1", "3"])
def test_a_product_is_the_same_on_any_number_of_threads_and_beside_any_others(on_threads, dtype, digits, monkeypatch):
    monkeypatch.setenv("FEWBITS_INPUT_DIGITS", digits)
    inputs = torch.randn(700, 260, generator=sample(1)).to(dtype)
    for rows in (40, 300):  # fewer panels than threads, and more
        term = uniform(4, (rows, 260), 20, "integer")
        found = on_threads(lambda term=term: term.matmul(inputs), (1, 2, 3, 1))
        assert all(torch.equal(found[0], other) for other in found)
        if native.takes_many(native.available()[0], dtype):
            assert torch.equal(term.matmul(inputs[100:171]), found[0][100:171])


def test_a_layer_of_any_number_of_vectors_is_one_graph():
    layer = CompressedLinear(StoredLinear(CompressedTensor((uniform(4, (12, 64), 16, "integer"),)))).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for vectors in (3, 40, 130):
            inputs = torch.randn(vectors, 64, generator=sample(2)).bfloat16()
            assert torch.equal(compiled(inputs), layer(inputs))


def test_sizes_that_do_not_fit_are_refused(isa):
    matrix = uniform(4, (40, 64), 16, "integer").described()
    inputs = torch.randn(40, 64)
    for place, tensor in enumerate(matrix.tensors):
        short = [*matrix.tensors[:place], tensor[:-1].contiguous(), *matrix.tensors[place + 1 :]]
        with pytest.raises(ValueError, match="a buffer is not of the size that its layout says"):
            native.multiply(isa, short, matrix.layout, inputs)
