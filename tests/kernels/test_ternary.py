"""Products of codes of three values, five to a byte, on every instruction set, against the torch definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.formats.lines import Lines, may_lie_in_lines
from fewbits.formats.ternary import Ternary
from fewbits.formats.transposed import Transposed
from fewbits.formats.uniform import Uniform
from fewbits.kernels import dispatch, native
from fewbits.kernels.attention import serves

LIMIT = 1e-6  # of the sum of |input| times the largest scale of the row: what sums of float32 products may be off by
DIGITS_LIMIT = {1: 2**-6, 2: 2**-14}  # of the largest |input| times that scale, for each square root of a column
PANEL_LIMIT = 2**-8  # of the sum of |input * weight|, where panels of many vectors round weights to bfloat16
ROUNDED_TO = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of the product: the output's own rounding
pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


def ternary(rows: int, columns: int, group_size: int | None, scales: str = "fp16", seed: int = 0) -> Ternary:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(-1, 2, (rows, columns), generator=generator)
    made = torch.rand(1 if scales == "shared" else rows, -(-columns // (group_size or columns)), generator=generator) + 0.1
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "shared": torch.float16}.get(scales)
    return Ternary.from_signs(signs, None if dtype is None else made.to(dtype), group_size=group_size)


def errors(term: Ternary, inputs: Tensor, in_lines: bool = False) -> tuple[Tensor, Tensor]:
    """What a product by a kernel is off by, and the limit."""
    before = dispatch.counts["multiply"]
    found = (Lines.lay(term) if in_lines else term).matmul(inputs)
    assert dispatch.counts["multiply"] == before + 1 and found.dtype == inputs.dtype
    weight = term.define(torch.float64)
    expected = inputs.double() @ weight.T
    limit = LIMIT * inputs.double().abs().sum(-1, keepdim=True) * weight.abs().amax(1)
    reach = inputs.double().abs().amax(-1, keepdim=True) * weight.abs().amax(1)
    limit = limit + (DIGITS_LIMIT[2] * term.columns**0.5 * reach if inputs.dtype == torch.bfloat16 else 0)
    limit = limit + ROUNDED_TO[inputs.dtype] * (expected.abs() + limit) + torch.finfo(inputs.dtype).smallest_normal
    return (found.double() - expected).abs(), limit


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 700),
    group_size=st.one_of(st.none(), st.sampled_from([16, 17, 20, 32, 64, 100, 128, 256, 320]), st.integers(1, 400)),
    vectors=st.integers(1, 32),
    scales=st.sampled_from(["none", "fp16", "bf16", "fp32", "shared"]),
    dtype=st.sampled_from(list(ROUNDED_TO)),
)
def test_products_of_any_shape_agree(rows, columns, group_size, vectors, scales, dtype):
    term = ternary(rows, columns, group_size, scales, seed=columns)
    inputs = torch.randn(vectors, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        for name in native.available():
            patch.setenv("FEWBITS_FORCE_ISA", name)
            error, limit = errors(term, inputs)
            assert bool((error <= limit).all()), name


# Groups that begin inside of bytes and at their edges, that fill a vector of lanes and that take many, and a last one that is short.
@pytest.mark.parametrize(("columns", "group_size"), [(4096, 128), (4096, 64), (4000, 20), (1003, 333), (3200, 320), (515, 17), (640, 8)])
def test_groups_that_end_anywhere_agree(isa, columns, group_size):
    term = ternary(7, columns, group_size)
    for vectors in (1, 3, 8):
        error, limit = errors(term, torch.randn(vectors, columns, generator=torch.Generator().manual_seed(vectors)))
        assert bool((error <= limit).all())


@pytest.mark.parametrize("scales", ["none", "fp16", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decoding_is_bit_for_bit_the_definition(isa, scales, dtype):
    for columns, group_size in ((1, None), (4, 2), (37, 5), (503, 32)):
        term, before = ternary(9, columns, group_size, scales), dispatch.counts["decode"]
        assert torch.equal(term.decode(dtype), term.define(dtype)) and dispatch.counts["decode"] == before + 1
        assert torch.equal(Transposed(term).decode(dtype), term.define(dtype).T)


def test_every_byte_means_what_the_definition_says(isa):
    every = torch.arange(256, dtype=torch.uint8)
    for codes in (every.view(1, -1), every.view(-1, 1)):  # 243 and more are no codes that packing makes
        term = Ternary(codes, None, len(codes), 5 * codes.shape[1], 5 * codes.shape[1])
        assert torch.equal(term.decode(), term.define())
        inputs = torch.eye(term.columns)[:32]
        assert torch.equal(term.matmul(inputs), term.define().T[:32])


@pytest.mark.parametrize("digits", [1, 2])
def test_fewer_digits_of_inputs_keep_their_own_limit(isa, digits, monkeypatch):
    monkeypatch.setenv("FEWBITS_INPUT_DIGITS", str(digits))
    term, inputs = ternary(11, 1100, 128), torch.randn(3, 1100, generator=torch.Generator().manual_seed(1))
    for some in (inputs, inputs[:1]):
        error, limit = errors(term, some)
        reach = some.double().abs().amax(-1, keepdim=True) * term.define(torch.float64).abs().amax(1)
        assert bool((error <= DIGITS_LIMIT[digits] * 1100**0.5 * reach).all())
        if digits == 1:  # a loss where kernels compute in fixed point, and none elsewhere
            assert bool((error > limit).any()) == (isa in ("avx2", "avx512vnni", "neondot"))


def test_an_input_far_above_the_others_and_inputs_that_are_not_finite(isa):
    term, inputs = ternary(9, 512, 128), torch.randn(5, 512, generator=torch.Generator().manual_seed(2))
    inputs[0, 77] = 3e4
    inputs[1] *= 1e-30
    inputs[2] *= 1e30
    for some in (inputs, inputs[:1]):
        error, limit = errors(term, some)
        assert bool((error <= limit).all())
    inputs[3, 5], inputs[4, 300] = torch.inf, torch.nan
    found = term.matmul(inputs)
    assert not torch.isfinite(found[3:]).any() and torch.isfinite(found[:3]).all()


def test_results_do_not_depend_on_the_number_of_threads(isa, on_threads):
    term, inputs = ternary(300, 640, 64), torch.randn(3, 640, generator=torch.Generator().manual_seed(3))
    found = on_threads(lambda: term.matmul(inputs))
    assert all(torch.equal(found[0], other) for other in found)


def test_scales_that_are_codes_themselves(isa):
    signs = torch.randint(-1, 2, (6, 160), generator=torch.Generator().manual_seed(4))
    inner = Uniform.from_codes(
        torch.randint(1, 16, (6, 5), generator=torch.Generator().manual_seed(5)), torch.ones(6, 1).half(), None, bits=4
    )
    term = Ternary(Ternary.from_signs(signs).codes, inner.decode(), 6, 160, 32)
    two_levels = Ternary(term.codes, inner, 6, 160, 32)
    inputs = torch.randn(2, 160, generator=torch.Generator().manual_seed(6))
    assert torch.equal(two_levels.matmul(inputs), term.matmul(inputs)) and torch.equal(two_levels.decode(), term.define())
    assert torch.equal(two_levels.define(), term.define())


def test_attention_does_not_take_them_for_a_uniform_grid():
    term = ternary(8, 64, 32)
    assert not serves(term.described()) and serves(
        Uniform.from_codes(torch.zeros(8, 64), torch.ones(8, 2), None, bits=2, group_size=32).described()
    )


# Rows of whole words and of halves; groups that end in words and at their edges; 16 to 112 rows: blocks of every size.
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(64, 4096, 128), (16, 4096, None), (112, 1010, 333), (48, 400, 20), (32, 509, 17)]
)
@pytest.mark.parametrize("scales", ["none", "fp16", "fp32", "shared"])
def test_codes_in_lines_agree(isa, rows, columns, group_size, scales):
    term = ternary(rows, columns, group_size, scales)
    assert may_lie_in_lines(term) == (isa == "avx512vnni")
    for vectors, dtype in ((1, torch.bfloat16), (1, torch.float32), (3, torch.float16), (40, torch.bfloat16)):
        if vectors > 32 and not native.takes_many(isa, dtype):
            continue  # decoded, and multiplied by torch
        inputs = torch.randn(vectors, columns, generator=torch.Generator().manual_seed(vectors)).to(dtype)
        error, limit = errors(term, inputs, in_lines=True)
        if vectors > 32 and dtype == torch.bfloat16:  # panels round weights
            limit = limit + PANEL_LIMIT * (inputs.double().abs() @ term.define(torch.float64).abs().T)
        assert bool((error <= limit).all())


@settings(deadline=None, max_examples=40)
@given(
    sixteens=st.integers(1, 9),
    halves=st.integers(2, 80),
    group_size=st.one_of(st.none(), st.sampled_from([16, 17, 20, 32, 64, 100, 128, 256]), st.integers(1, 400)),
    vectors=st.integers(1, 5),
    dtype=st.sampled_from(list(ROUNDED_TO)),
)
def test_codes_in_lines_of_any_shape_agree(sixteens, halves, group_size, vectors, dtype):
    term = ternary(16 * sixteens, 10 * halves - sixteens % 5, group_size, seed=halves)
    inputs = torch.randn(vectors, term.columns, generator=torch.Generator().manual_seed(halves)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        for name in native.available():
            patch.setenv("FEWBITS_FORCE_ISA", name)
            error, limit = errors(term, inputs, in_lines=True)
            assert bool((error <= limit).all()), name


def test_every_byte_in_lines_means_what_the_definition_says(isa):
    term = Ternary(torch.arange(256, dtype=torch.uint8).repeat(16, 1).roll(3, 0), None, 16, 1280, 1280)
    inputs = torch.eye(1280)
    for first in range(0, 1280, 32):
        assert torch.equal(Lines.lay(term).matmul(inputs[first : first + 32]), term.define().T[first : first + 32])
    assert torch.equal(Lines.lay(term).decode(), term.define())


@pytest.mark.parametrize("digits", [1, 2])
def test_fewer_digits_of_inputs_keep_their_own_limit_in_lines(isa, digits, monkeypatch):
    monkeypatch.setenv("FEWBITS_INPUT_DIGITS", str(digits))
    term, generator = ternary(64, 1100, 128), torch.Generator().manual_seed(1)
    for inputs in (torch.randn(3, 1100, generator=generator), torch.rand(2, 1100, generator=generator) + 0.5):
        for some in (inputs, inputs[:1]):
            error, _ = errors(term, some, in_lines=True)
            reach = some.double().abs().amax(-1, keepdim=True) * term.define(torch.float64).abs().amax(1)
            assert bool((error <= DIGITS_LIMIT[digits] * 1100**0.5 * reach).all())


def test_lines_of_inputs_far_apart_and_not_finite(isa):
    term, inputs = ternary(64, 520, 128), torch.randn(5, 520, generator=torch.Generator().manual_seed(2))
    inputs[0, 77] = 3e4
    inputs[1] *= 1e-30
    inputs[2] *= 1e30
    error, limit = errors(term, inputs[:3], in_lines=True)
    assert bool((error <= limit).all())
    inputs[3, 5], inputs[4, 300] = torch.inf, torch.nan
    found = Lines.lay(term).matmul(inputs)
    assert not torch.isfinite(found[3:]).any() and torch.isfinite(found[:3]).all()


def test_lines_do_not_depend_on_the_number_of_threads(isa, on_threads):
    term, inputs = Lines.lay(ternary(304, 640, 64)), torch.randn(3, 640, generator=torch.Generator().manual_seed(3))
    found = on_threads(lambda: term.matmul(inputs))
    assert all(torch.equal(found[0], other) for other in found)


def test_rows_of_odd_bytes_and_groups_of_few_columns_stay_by_rows(isa):
    assert not may_lie_in_lines(ternary(16, 515, None)) and not may_lie_in_lines(ternary(16, 640, 8))
