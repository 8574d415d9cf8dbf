"""What native steps, and a stack of them, are told is looked at before anything is read; tests/models has what they compute."""

import pytest
import torch

from fewbits.formats.uniform import Uniform
from fewbits.kernels import native
from fewbits.kernels.decoder_stack import DecoderStack
from fewbits.kernels.decoder_step import DecoderStep, Heads, Way
from fewbits.kernels.sums import describe_sum

HEADS = Heads(4, 2, 8)
SHAPES = ((32, 24), (16, 24), (16, 24), (24, 32), (40, 24), (40, 24), (24, 40))  # queries, keys, values, output, gate, up, down
pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


def sums(shapes=SHAPES):
    found = []
    for rows, columns in shapes:
        codes = torch.randint(16, (rows, columns), generator=torch.Generator().manual_seed(rows))
        found.append(describe_sum([(Uniform.from_codes(codes, torch.ones(rows, 1), None, bits=4).described(),)]))
    return found


def norms(*sizes, dtype=torch.float32):
    return [torch.ones(size, dtype=dtype) for size in sizes]


def changed(place, shape):
    return sums([shape if index == place else one for index, one in enumerate(SHAPES)])


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("do not fit the heads", lambda: (HEADS, changed(1, (32, 24)), norms(24, 24))),
        ("the output does not fit", lambda: (HEADS, changed(3, (24, 40)), norms(24, 24))),
        ("gate, up and down do not fit", lambda: (HEADS, changed(5, (48, 24)), norms(24, 24))),
        (
            "the channels of a head must be pairs",
            lambda: (Heads(1, 1, 9), sums([(9, 24)] * 3 + [(24, 9)] + list(SHAPES[4:])), norms(24, 24)),
        ),
        ("a buffer is not of the size", lambda: (HEADS, sums(), norms(24, 23))),
        ("a buffer is not of the size", lambda: (HEADS, sums(), norms(24, 24, 8, 7))),
        ("a layout ends too early", lambda: (HEADS, sums()[:6], norms(24, 24))),
        ("a buffer is not of the size", lambda: (HEADS, [*sums(), *sums()[:1]], norms(24, 24))),
    ],
)
def test_parts_that_do_not_fit_are_refused(words, given):
    heads, several, weights = given()
    with pytest.raises(ValueError, match=words):
        DecoderStep(heads, several, weights, [1e-6] * len(weights))


def test_calls_that_do_not_fit_are_refused():
    step, isa = DecoderStep(HEADS, sums(), norms(24, 24), [1e-6] * 2), native.chosen()
    held = [torch.zeros(1, size) for size in (24, 8, 8, 32, 16, 16)]
    step.native.before(isa, native.buffers(held), 1, 1, 1, 3)
    for place in range(6):
        short = [one[:, 1:].contiguous() if index == place else one for index, one in enumerate(held)]
        with pytest.raises(ValueError, match="a buffer is not of the size that the step needs"):
            step.native.before(isa, native.buffers(short), 1, 1, 1, 3)
    for tokens, positions, digits in ((0, 1, 3), (1, 2, 3), (1, 0, 3), (2**41, 1, 3), (1, 1, 4)):
        with pytest.raises(ValueError, match=r"out of range|position|digits"):
            step.native.before(isa, native.buffers(held), tokens, positions, 1, digits)
    with pytest.raises(ValueError, match="more or fewer buffers"):
        step.native.after(isa, native.buffers(held), 1, 1, 3)
    with pytest.raises(ValueError, match="instruction set none is not available"):
        step.native.before("none", native.buffers(held), 1, 1, 1, 3)


def test_a_norm_of_zeros_is_its_epsilon(monkeypatch):
    step = DecoderStep(HEADS, sums(), norms(24, 24, 8, 8), [1e-6] * 4)
    way = Way.chosen(torch.float32)
    queries, keys, values = step.before(way, torch.zeros(2, 3, 24), torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    assert queries.shape == (2, 4, 3, 8) and keys.shape == values.shape == (2, 2, 3, 8)
    assert not queries.any() and not keys.any() and not values.any()
    states = torch.full((2, 3, 24), 0.5)
    assert torch.equal(step.after(way, torch.zeros(2, 3, 4, 8), states)[0, 0], step.after(way, torch.zeros(2, 3, 4, 8), states)[1, 2])
    monkeypatch.setenv("FEWBITS_FORCE_ISA", "none")
    assert Way.chosen(torch.float32) is None


def test_stacks_and_tokens_that_do_not_fit_are_refused():
    step, isa = DecoderStep(HEADS, sums(), norms(24, 24), [1e-6] * 2), native.chosen()
    narrow = [(16, 24), (8, 24), (8, 24), (24, 16), *SHAPES[4:]]
    half = DecoderStep(Heads(4, 2, 4), sums(narrow), norms(24, 24), [1e-6] * 2)
    with pytest.raises(ValueError, match="one width and one type"):
        DecoderStack([step, half], *norms(24), 1e-6, 0.3)
    with pytest.raises(ValueError, match="a multiple of 8 channels"):
        DecoderStack([half], *norms(24), 1e-6, 0.3)
    with pytest.raises(ValueError, match="the norm behind the layers"):
        DecoderStack([step], *norms(23), 1e-6, 0.3)
    stack = DecoderStack([step, step], *norms(24), 1e-6, 0.3)
    held, rooms = [torch.zeros(size) for size in (24, 8, 8, 24)], [torch.zeros(2, 5, 8) for _ in range(4)]

    def run(held=held, rooms=rooms, before=4, digits=3, isa=isa):
        return stack.native.run(isa, native.buffers(held), native.buffers(rooms), before, 1, digits)

    assert run() is True
    for place in range(4):
        short = [one[1:].clone() if index == place else one for index, one in enumerate(held)]
        with pytest.raises(ValueError, match="a buffer is not of the size that the stack needs"):
            run(held=short)
        uneven = [torch.zeros(2, 6, 8) if index == place else one for index, one in enumerate(rooms)]
        with pytest.raises(ValueError, match="there is no room"):
            run(rooms=uneven)
    for rooms_given, words in ((rooms[:2], "more or fewer buffers"), ([torch.zeros(81)] * 4, "there is no room")):
        with pytest.raises(ValueError, match=words):
            run(rooms=rooms_given)
    for before, digits in ((5, 3), (-1, 3), (2**62, 3), (4, 0)):
        with pytest.raises(ValueError, match=r"no room|out of range|digits"):
            run(before=before, digits=digits)
    with pytest.raises(ValueError, match="instruction set none is not available"):
        run(isa="none")


def test_a_watch_sees_entries_types_and_addresses():
    first, second, hooks, tensor = {"a": 1, "b": None}, {}, {}, torch.zeros(4)

    class Other(torch.nn.ReLU):
        pass

    module, one = torch.nn.ReLU(), object()
    first["a"] = one
    make = native.extension().Watch
    watch = make([first, first, second], ["a", "b", "c"], [module], [tensor], [hooks], [], torch.Tensor.data_ptr)
    assert watch.same() and watch.empty()
    changes = {
        "an entry": (lambda: first.update(a=object()), lambda: first.update(a=one)),
        "a missing entry": (lambda: first.pop("a"), lambda: first.update(a=one)),
        "another entry": (lambda: second.update(c=1), lambda: second.pop("c")),
        "a type": (lambda: setattr(module, "__class__", Other), lambda: setattr(module, "__class__", torch.nn.ReLU)),
    }
    for name, (change, back) in changes.items():
        change()
        assert not watch.same(), name
        back()
        assert watch.same(), name
    hooks["a"] = 1
    assert watch.same() and not watch.empty()
    old = tensor.data
    tensor.data = torch.zeros(4)
    assert not watch.same()
    tensor.data = old
    assert watch.same()
    with pytest.raises(ValueError, match="dictionaries"):
        make([module], ["a"], [], [], [], [], torch.Tensor.data_ptr)
    with pytest.raises(ValueError, match="each owner has a name"):
        make([first], [], [], [], [], [], torch.Tensor.data_ptr)
