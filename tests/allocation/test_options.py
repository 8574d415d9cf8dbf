import pytest
import torch

from fewbits.allocation.options import label, read_options
from fewbits.allocation.problem import LayerTrial
from fewbits.allocation.uniform import nearest_option, uniform_candidates
from fewbits.core.errors import InputError
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.layerwise import Layerwise
from fewbits.methods.weights.rtn import Rtn
from fewbits.methods.weights.squeezellm import Squeezellm


def test_every_method_comes_at_every_width_and_none_twice():
    assert read_options(["gptq"]) == (None, [Gptq(bits=bits) for bits in (2, 3, 4, 8)])
    _, options = read_options(["gptq:group_size=64", "rtn:bits=4,group_size=none", "gptq:group_size=64"], [3, 16])
    assert options == [Gptq(bits=3, group_size=64), Rtn(bits=16), Rtn(bits=4, group_size=None)]
    assert [label(option) for option in options] == ["gptq:bits=3,group_size=64", "rtn:bits=16", "rtn:bits=4,group_size=none"]


def test_a_method_that_allocates_brings_its_widths_and_its_base():
    assert read_options(["layerwise:measure=zd"]) == (Layerwise(measure="zd"), [Rtn(bits=bits, group_size=64) for bits in (4, 2)])
    allocator, options = read_options(["hqq", "layerwise"], [8, 4])
    assert allocator == Layerwise() and [label(option) for option in options] == ["hqq:bits=8", "hqq:bits=4"]


@pytest.mark.parametrize(
    ("specs", "bits", "says"),
    [
        (["gtpq"], (), "did you mean 'gptq'"),
        (["gptq:bits=3"], (), "leaves nothing to choose"),
        (["layerwise", "cptquant"], (), "layerwise and cptquant both allocate"),
        (["kivi"], (), "kivi does not compress single layers"),
        (["gptq"], (3, 9), "bits=9 is out of range"),
    ],
)
def test_what_is_wrong_is_said(specs, bits, says):
    with pytest.raises(InputError, match=says):
        read_options(specs, bits)


def trials(methods, shapes=((64, 128), (32, 192))):
    found = {}
    for number, (rows, columns) in enumerate(shapes):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(number))
        sizes = tuple(sum(method.compress(weight, None).bits().values()) for method in methods)
        found[f"layer{number}"] = LayerTrial("block", "fused", rows * columns, columns, sizes, (0.0,) * len(methods))
    return found


def stored(method):
    return sum(trial.sizes[0] for trial in trials([method]).values())


def test_the_uniform_model_has_the_largest_groups_that_still_make_it_as_large():
    options = [Rtn(bits=bits, group_size=32) for bits in (2, 3, 4)]
    weights = sum(trial.weights for trial in trials(options).values())
    for average in (2.3, 2.9, 3.25, 3.6, 4.4):
        spent = int(average * weights)
        candidates = list(uniform_candidates(options, trials(options), spent))
        found = candidates[0]
        assert stored(found) >= 0.99 * spent and stored(candidates[1]) > spent
        widest = [bits for bits in (2, 3, 4) if stored(Rtn(bits=bits, group_size=None)) <= spent]
        assert found.bits == widest[-1] and not found.symmetric
        assert [one.group_size for one in candidates] == sorted((one.group_size for one in candidates), reverse=True)
        larger = stored(Rtn(bits=found.bits, group_size=min(192, 2 * found.group_size)))
        assert larger < spent * 1.01


def test_methods_without_groups_are_compared_by_their_nearest_option():
    options = [Rtn(bits=2), Rtn(bits=3), Rtn(bits=4)]
    assert list(uniform_candidates([Squeezellm(bits=3)], trials(options), 10**6)) == []
    table = trials(options)
    totals = [sum(trial.sizes[index] for trial in table.values()) for index in range(3)]
    assert nearest_option(options, table, totals[1] + 1) == options[1] and nearest_option(options, table, 1) == options[0]
