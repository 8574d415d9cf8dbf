"""Attention over packed keys and values: every instruction set against the torch definition, in float64, under one named limit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.formats.uniform import Uniform
from fewbits.kernels import attention, native
from fewbits.kernels.attention import Segment, attend, define, serves
from fewbits.kernels.dispatch import counts

# Of (1 + what a score's terms add up to) * (the largest |code * scale| + |zero * scale| of the values): what float32 sums may be off by.
ATTENTION_LIMIT = 2e-7
ROUNDED_TO = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of the output, by its own rounding

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
ISAS = [name for name in native.available() if name in native.INSTRUCTION_SETS]


@pytest.fixture(params=ISAS or ["none"])
def isa(request, monkeypatch):
    monkeypatch.setenv("FEWBITS_FORCE_ISA", request.param)
    return request.param


def sample(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed(states: Tensor, heads: int, bits: int, group_size: int, keys: bool, numbers=torch.float16, symmetric=False) -> Segment:
    """`states [tokens, channels]` rounded; keys in groups of tokens, values in groups of channels."""
    matrix = states.T.contiguous() if keys else states
    term = Uniform.between_extremes(matrix, bits=bits, group_size=group_size)
    zeros = None if symmetric else term.zero_points.to(numbers)
    term = Uniform.from_codes(term.unpacked_codes(), term.scales.to(numbers), zeros, bits=bits, group_size=group_size)

    def plain() -> Tensor:
        dense = term.define(torch.float64)
        return (dense.T if keys else dense).reshape(len(states), heads, -1)

    assert serves(term.described())
    return Segment(len(states), plain, term.described())


def exact(states: Tensor, heads: int) -> Segment:
    numbers = states.view(len(states), heads, -1)
    return Segment(len(states), lambda: numbers)


def side(lengths, shape, keys, generator, options, tail=torch.float32):
    """Segments of one sequence: all but the last are packed, the last is exact."""
    heads, width = shape
    parts = [torch.randn(count, heads * width, generator=generator) for count in lengths]
    return [*(packed(part, heads, *options, keys) for part in parts[:-1]), exact(parts[-1].to(tail), heads)]


def case(shape, share, queries, key_lengths, value_lengths, bits=4, group_size=32, batch=2, seed=0, dtype=torch.float32):  # noqa: PLR0913
    generator = sample(seed)
    keys = [side(key_lengths, shape, True, generator, (bits, group_size), dtype) for _ in range(batch)]
    values = [side(value_lengths, shape, False, generator, (bits, group_size), dtype) for _ in range(batch)]
    return torch.randn(batch, shape[0] * share, queries, shape[1], generator=generator).to(dtype), keys, values


def reach(segments, query: Tensor, scale: float) -> tuple[float, float]:
    """Of any token: what the terms of its score add up to, and the largest of its numbers with its zero point's part."""
    scores, numbers = 0.0, 0.0
    for segment in segments:
        size = segment.plain().abs().amax()
        if segment.matrix is not None:
            bits, (scales, *zeros) = segment.matrix.layout[2], (tensor.float().abs() for tensor in segment.matrix.tensors[1:])
            size = ((2**bits - 1 + (zeros[0] if zeros else 2 ** (bits - 1))) * scales).amax()
        scores, numbers = max(scores, float(size * query.abs().sum(-1).max() * scale)), max(numbers, float(size))
    return scores, numbers


def assert_agrees(query, keys, values, mask=None) -> None:
    heads, scale, before = keys[0][0].plain().shape[1], query.shape[-1] ** -0.5, counts.copy()
    found = attend(query, keys, values, mask, scale, heads=heads)
    assert (counts - before).keys() <= {"attend", "attend_dense"} and counts != before and found.dtype == query.dtype  # the kernel ran
    assert found.shape == (query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    expected = define(query.double(), keys, values, mask, scale, heads=heads)
    for row in range(len(query)):
        scores, _ = reach(keys[row], query[row].double(), scale)
        _, numbers = reach(values[row], query[row].double(), scale)
        limit = ATTENTION_LIMIT * (1 + scores) * numbers + ROUNDED_TO[query.dtype] * expected[row].abs()
        limit = limit + torch.finfo(query.dtype).smallest_normal
        assert bool(((found[row].double() - expected[row]).abs() <= limit).all())


@pytest.mark.parametrize("share", [1, 4, 8])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_and_share_of_heads(isa, bits, share):
    assert_agrees(*case((2, 64), share, 1, [640, 29], [600, 69], bits, batch=1))


# Groups of many blocks of lanes, of parts of one, of neither; heads of parts of a block, of several, of padded ones.
@pytest.mark.parametrize("group_size", [8, 24, 64, 128, 1000])
@pytest.mark.parametrize("width", [8, 32, 40, 96, 128, 256])
def test_every_head_meets_every_group(isa, width, group_size):
    for bits, lengths in ((3, [77, 9]), (4, [513, 130, 1, 1]), (8, [129, 5])):
        query, keys, values = case((2, width), 3, 1, lengths, [sum(lengths) - 3, 3], bits, group_size, batch=1)
        assert_agrees(query, keys, values)


@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(1, 8),
    shape=st.tuples(st.integers(1, 4), st.sampled_from([8, 16, 24, 32, 64, 80, 128])),
    share=st.integers(1, 9),
    queries=st.integers(1, 3),
    group_size=st.sampled_from([8, 16, 32, 40, 64, 128, 512]),
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=4),
    split=st.floats(0.0, 1.0),
    dtype=st.sampled_from(list(ROUNDED_TO)),
    masked=st.sampled_from(["no", "seen", "added", "all sequences"]),
    seed=st.integers(0, 10**6),
)
def test_any_sizes_agree(bits, shape, share, queries, group_size, lengths, split, dtype, masked, seed):  # noqa: PLR0913
    tokens = sum(lengths)
    cut = int(split * (tokens - 1))  # values need not be cut where keys are
    value_lengths = [cut, tokens - cut] if cut else [tokens]
    query, keys, values = case(shape, share, queries, lengths, value_lengths, bits, group_size, 2, seed, dtype)
    generator = sample(seed)
    mask = None if masked == "no" else torch.rand(2, queries, tokens, generator=generator) > 0.4
    if masked == "added":
        mask = torch.randn(2, queries, tokens, generator=generator) * 3
    if masked == "all sequences":
        mask = mask[:1]
    with pytest.MonkeyPatch.context() as patch:
        for name in ISAS:
            patch.setenv("FEWBITS_FORCE_ISA", name)
            assert_agrees(query, keys, values, mask)


@pytest.mark.parametrize("numbers", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_kinds_of_scales_and_zero_points(isa, numbers, symmetric):
    states = [torch.randn(200, 64, generator=sample(seed)) for seed in (0, 1)]
    keys, values = ([[packed(one, 2, 5, 16, is_keys, numbers, symmetric)]] for one, is_keys in zip(states, (True, False), strict=True))
    assert_agrees(torch.randn(1, 4, 1, 32, generator=sample(2)), keys, values)


def test_the_limit_notices_one_step_of_one_scale(isa):
    """What the limit allows is less than what the smallest mistake in reading a grid would be."""
    query, keys, values = case((2, 64), 4, 1, [640, 29], [600, 69], batch=1)
    wrong = [part.clone() for part in values[0][0].matrix.tensors]
    wrong[1][300, 1] *= 1.3
    moved = Segment(600, values[0][0].plain, attention.Description(tuple(wrong), values[0][0].matrix.layout))
    with pytest.raises(AssertionError):
        assert_agrees(query, keys, [[moved, values[0][1]]])


def test_by_hand(isa):
    """Two tokens whose scores differ by ln 3: weights of 1/4 and 3/4."""
    keys = Uniform.from_codes(torch.tensor([[0, 1]] + [[0, 0]] * 7), torch.ones(8, 1), torch.zeros(8, 1), bits=2)
    values = Uniform.from_codes(torch.tensor([[0] * 8, [4] * 7 + [8]]), torch.ones(2, 1), torch.zeros(2, 1), bits=4)
    query = torch.zeros(1, 1, 1, 8)
    query[..., 0] = math.log(3)
    stored = ([[Segment(2, lambda: torch.empty(0), term.described())]] for term in (keys, values))
    found = attend(query, *stored, None, 1.0, heads=1)
    torch.testing.assert_close(found.flatten(), torch.tensor([3.0] * 7 + [6.0]), rtol=1e-6, atol=0)


def test_what_is_not_seen_has_no_weight(isa):
    query, keys, values = case((2, 32), 2, 1, [500, 100], [560, 40], batch=1)
    mask = torch.ones(1, 1, 600, dtype=torch.bool)
    mask[..., :300] = False
    left = [[[exact(torch.cat([one.plain().float() for one in of[0]])[300:].flatten(1), 2)]] for of in (keys, values)]
    found = attend(query, keys, values, mask, 0.2, heads=2)
    torch.testing.assert_close(found, attend(query, *left, None, 0.2, heads=2), rtol=1e-5, atol=1e-5)
    assert (found - attend(query, keys, values, None, 0.2, heads=2)).abs().max() > 0.01
    for attention_of in (attend, define):
        nothing = attention_of(query, keys, values, torch.zeros_like(mask), 0.2, heads=2)
        assert torch.equal(nothing, torch.zeros_like(nothing))


def test_what_is_not_finite_is_not_hidden(isa):
    query, keys, values = case((1, 32), 1, 1, [300, 9], [300, 9], batch=1)
    for wrong in (torch.nan, torch.inf):
        asked = query.clone()
        asked[..., 3] = wrong
        assert not bool(attend(asked, keys, values, None, 0.2, heads=1).isfinite().any())


def test_it_is_the_same_each_time_and_on_any_number_of_threads(isa, on_threads):
    query, keys, values = case((2, 64), 4, 1, [1536, 300, 2], [1838 - 77, 77])
    found = on_threads(lambda: [attend(query, keys, values, None, 0.125, heads=2) for _ in range(4)], (1, 1, 2, 3, 2))
    assert all(torch.equal(found[0][0], other) for some in found for other in some)


def test_without_a_kernel_the_definition_serves(monkeypatch):
    query, keys, values = case((2, 32), 2, 1, [100, 9], [100, 9])
    monkeypatch.setenv("FEWBITS_FORCE_ISA", "none")
    before = counts["definition"]
    found = attend(query, keys, values, None, 0.2, heads=2)
    assert counts["definition"] == before + 1 and torch.equal(found, define(query, keys, values, None, 0.2, heads=2))
    dense = [torch.stack([torch.cat([one.plain().float() for one in row]) for row in side]).transpose(1, 2) for side in (keys, values)]
    torch.testing.assert_close(
        found.transpose(1, 2), torch.nn.functional.scaled_dot_product_attention(query, *dense, scale=0.2, enable_gqa=True)
    )


def test_other_layouts_are_not_served():
    states = torch.randn(64, 32, generator=sample(0))
    fits = Uniform.between_extremes(states, bits=4, group_size=8)
    assert serves(fits.described())
    assert not serves(None)
    assert not serves(Uniform.between_extremes(states, bits=4, group_size=12).described())  # a scale would change within a lane
    assert not serves(Uniform.from_codes(fits.unpacked_codes(), fits.scales[:1], fits.zero_points[:1], bits=4, group_size=8).described())
    whole = torch.zeros_like(fits.scales, dtype=torch.uint8)
    assert not serves(Uniform.from_codes(fits.unpacked_codes(), fits.scales, whole, bits=4, group_size=8).described())


def test_sizes_that_do_not_fit_are_refused_before_anything_is_read(isa, monkeypatch):
    query, keys, values = case((2, 32), 2, 1, [64, 9], [65, 8])
    told: list[tuple] = []
    real = native.extension()

    class Noted:
        def attend(self, *arguments):
            told.append(arguments)
            real.attend(*arguments)

    monkeypatch.setattr(native, "extension", Noted)
    attend(query, keys, values, torch.ones(2, 1, 73, dtype=torch.bool), 0.2, heads=2)
    name, layout, buffers, *rest = told[0]
    generator, refused = sample(0), 0
    for turn in range(300):
        sizes, memory = list(layout), list(buffers)
        place = int(torch.randint(len(sizes), (1,), generator=generator))
        if turn % 3:
            sizes[place] += int(torch.randint(1, 200, (1,), generator=generator)) * (2**33 if turn % 2 else 1)
        else:
            memory[2 * int(torch.randint(len(memory) // 2, (1,), generator=generator)) + 1] -= 1
        try:
            real.attend(name, sizes, memory, *rest)
        except ValueError:
            refused += 1
    assert refused > 150
    with pytest.raises(ValueError, match="a layout describes less than was given"):
        real.attend(name, [*layout, 0], buffers, *rest)
    with pytest.raises(ValueError, match="instruction set mmx is not available"):
        real.attend("mmx", layout, buffers, *rest)


def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    monkeypatch.setenv("FEWBITS_FORCE_ISA", "sse9")
    query, keys, values = case((1, 8), 1, 1, [9, 1], [9, 1])
    with pytest.raises(InputError, match="FEWBITS_FORCE_ISA='sse9' is not known"):
        attend(query, keys, values, None, 1.0, heads=1)
