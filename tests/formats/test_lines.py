"""Codes in lines: the order itself, there and back, and that a term computes the same in it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.formats.binary import Binary
from fewbits.formats.codebook import Codebook
from fewbits.formats.dense import Dense
from fewbits.formats.lines import Lines, lay, may_lie_in_lines
from fewbits.formats.minifloat import E4M3, E5M2, Minifloat
from fewbits.formats.stepped import Stepped
from fewbits.formats.ternary import Ternary
from fewbits.formats.uniform import Uniform
from fewbits.kernels import native

READERS = ("avx512vnni", "avx2")  # instruction sets that read lines


@pytest.fixture(params=READERS)
def reader(request, monkeypatch) -> str:
    """Each of them that this machine has, in turn."""
    if request.param not in native.available():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("FEWBITS_FORCE_ISA", request.param)
    return request.param


@pytest.fixture(params=native.available() or ["none"])
def isa(request, monkeypatch) -> str:
    """Each instruction set of this machine in turn, whether it reads lines or brings rows into order."""
    monkeypatch.setenv("FEWBITS_FORCE_ISA", request.param)
    return request.param


def uniform(rows: int, columns: int, bits: int = 4, group_size: int = 32, zeros: str = "integer", seed: int = 0) -> Uniform:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    points = {
        "none": None,
        "integer": torch.randint(2**bits, (rows, groups), generator=generator),
        "real": torch.rand(rows, groups, generator=generator).half(),
    }[zeros]
    return Uniform.from_codes(codes, (torch.rand(rows, groups, generator=generator) + 0.1).half(), points, bits=bits, group_size=group_size)


def two_levels(rows: int, columns: int) -> Stepped:
    steps, minimums = (
        Stepped.from_codes(torch.randint(64, (rows, columns // 32)), sign * torch.rand(rows, 1).half() / 64, None, bits=6, group_size=8)
        for sign in (1, -1)
    )
    return Stepped.from_codes(torch.randint(16, (rows, columns)), steps, minimums, bits=4, group_size=32)


def test_a_line_is_a_word_of_each_of_sixteen_rows_and_scales_a_number_of_each():
    term = uniform(32, 64, group_size=32, zeros="real")
    laid = Lines.lay(term).term
    words, lines = term.codes.view(torch.int32), laid.codes.view(torch.int32).view(2, 8, 16)
    for row, word in ((0, 0), (3, 0), (3, 7), (16, 0), (31, 5)):
        assert lines[row // 16, word, row % 16] == words[row, word]
    for tensor, lies in ((term.scales, laid.scales), (term.zero_points, laid.zero_points)):
        assert all(lies.view(2, 2, 16)[row // 16, group, row % 16] == tensor[row, group] for row in (0, 7, 16, 31) for group in (0, 1))
    assert list(lay(term, torch.empty_like)) == ["codes", "scales", "zero_points"]


@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([1, 2, 3, 4, 5, 8]),
    st.sampled_from(["none", "integer", "real"]),
    st.integers(0, 99),
)
def test_there_and_back_is_what_it_was(sixteens, runs, bits, zeros, seed):
    term = uniform(16 * sixteens, 32 * runs, bits, zeros=zeros, seed=seed)
    laid = Lines.lay(term)
    assert laid.shape == term.shape and laid.bits().values() and sum(laid.bits().values()) == sum(term.bits().values())
    back = laid.plain().tensors()
    assert all(torch.equal(back[name], tensor) for name, tensor in term.tensors().items())


@pytest.mark.parametrize(
    "term",
    [
        uniform(32, 96),
        uniform(48, 64, bits=3, zeros="real"),
        Codebook.from_codes(torch.randint(16, (32, 64)), torch.randn(1, 1, 16).half(), torch.rand(32, 2), bits=4, group_size=32),
        Binary.from_signs(torch.randn(32, 64), torch.rand(32, 2).half(), torch.randn(32, 2).half(), group_size=32),
        Stepped.from_codes(torch.randint(16, (32, 64)), torch.rand(32, 2).half(), torch.randn(32, 2).half(), bits=4, group_size=32),
        two_levels(32, 128),
        Ternary.from_signs(torch.randint(-1, 2, (32, 160)), torch.rand(32, 5).half(), group_size=32),
        Ternary.from_signs(torch.randint(-1, 2, (32, 110)), torch.rand(32, 4).half(), group_size=32),
    ],
    ids=["uniform", "3 bits", "codebook", "signs", "minimums", "minimums of two levels", "ternary", "ternary by halves of words"],
)
def test_a_term_in_lines_decodes_and_gives_rows_as_it_does(isa, term):
    laid, rows = Lines.lay(term), torch.tensor([3, 30, 16, 3])
    assert torch.equal(laid.decode(), term.define()) and torch.equal(laid.define(), term.define())
    assert torch.equal(laid.decode(torch.bfloat16), term.define(torch.bfloat16))
    assert torch.equal(laid.taken(rows).decode(), term.define()[rows])
    inputs = torch.randn(3, term.shape[1])
    torch.testing.assert_close(laid.matmul(inputs), inputs @ term.define().T, atol=2e-4, rtol=1e-5)
    assert all(torch.equal(laid.plain().tensors()[name], tensor) for name, tensor in term.tensors().items())


def test_ternary_rows_that_are_not_of_whole_words_lie_by_halves():
    codes = torch.arange(16 * 22, dtype=torch.uint8).view(16, 22)
    laid = Lines.lay(Ternary(codes, None, 16, 110, 110)).term.codes.view(11, 16, 2)
    assert all(torch.equal(laid[half, row], codes[row, 2 * half : 2 * half + 2]) for half in range(11) for row in range(16))


def test_terms_in_lines_are_joined_by_rows(isa):
    above, below = uniform(16, 32), uniform(32, 32, seed=1)
    both = Lines.lay(above).stacked(Lines.lay(below))
    assert torch.equal(both.decode(), torch.cat([above.decode(), below.decode()]))
    wide = Lines.lay(uniform(16, 64)).widened(uniform(16, 32, seed=2))
    assert torch.equal(wide.decode(), torch.cat([uniform(16, 64).decode(), uniform(16, 32, seed=2).decode()], 1))


def test_only_what_a_kernel_reads_faster_so_lies_in_lines(reader):
    assert may_lie_in_lines(uniform(32, 96))
    assert not may_lie_in_lines(Lines.lay(uniform(32, 96)))  # it does
    assert not may_lie_in_lines(uniform(24, 96))  # no sixteens
    assert not may_lie_in_lines(uniform(32, 100, group_size=100))  # words that end inside of a line's columns
    assert not may_lie_in_lines(uniform(32, 96, group_size=24))  # groups that do
    assert not may_lie_in_lines(Dense(torch.rand(32, 32).half()))
    levels = torch.randn(32, 1, 16).half()
    assert not may_lie_in_lines(Codebook.from_codes(torch.randint(16, (32, 64)), levels, bits=4))  # levels of each row
    shared = [Codebook.from_codes(torch.randint(2, (32, 64)), torch.randn(1, 1, 2**bits).half(), bits=bits) for bits in range(1, 9)]
    assert [may_lie_in_lines(term) for term in shared] == [bits <= {"avx512vnni": 8, "avx2": 4}[reader] for bits in range(1, 9)]
    codes, steps, minimums = torch.randint(16, (32, 96)), torch.rand(32, 3).half(), torch.randn(32, 3).half()
    for added in (None, minimums):
        assert may_lie_in_lines(Stepped.from_codes(codes, steps, added, bits=4, group_size=32))
    assert not may_lie_in_lines(Stepped.from_codes(codes, steps.double(), minimums, bits=4, group_size=32))  # numbers that no kernel reads


@pytest.mark.skipif("avx512vnni" not in native.available(), reason="no other instruction set looks 256 levels up in lines")
@pytest.mark.parametrize("layout, said", [(E4M3, 0x7F), (E4M3, 0xFF), (E5M2, 0x7C), (E5M2, 0xFD)])
def test_levels_that_are_no_numbers_lie_in_lines_as_long_as_no_code_says_them(layout, said):
    term = Minifloat.round_to_nearest(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), layout)
    inputs = torch.rand(2, 64, generator=torch.Generator().manual_seed(1)) + 0.1
    assert may_lie_in_lines(term)
    torch.testing.assert_close(Lines.lay(term).matmul(inputs), inputs @ term.define().T)
    term.codes[5, 3] = said
    assert not may_lie_in_lines(term)
    broken = ~torch.isfinite(term.matmul(inputs))
    assert bool(broken[:, 5].all()) and int(broken.sum()) == 2
    narrow = Codebook.from_codes(torch.zeros(32, 64, dtype=torch.int64), torch.ones(1, 1, 2), bits=1)
    assert may_lie_in_lines(narrow)
    assert not may_lie_in_lines(replace(narrow, levels=torch.tensor([[[1.0, torch.inf]]])))  # whether a code says it is not looked for


@pytest.mark.parametrize("other", ["none", "scalar", "avx512", "neon", "neondot"])
def test_kernels_that_do_not_read_lines_are_given_none(other, monkeypatch):
    if other not in ("none", *native.available()):
        pytest.skip(f"this machine has no {other}")
    monkeypatch.setenv("FEWBITS_FORCE_ISA", other)
    assert not may_lie_in_lines(uniform(32, 96))
