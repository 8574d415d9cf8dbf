import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.formats.codebook import Codebook, nearest_codes, normal_float_levels
from fewbits.formats.flat_scales import FlatScales


def scales(rows=6, columns=5, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03 + 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups_run_through_the_rows_and_reach_their_largest(bits, dtype):
    dense = scales()
    term = FlatScales.nearest(dense, bits=bits, group_size=8, dtype=dtype)
    decoded = term.decode()
    assert decoded.shape == dense.shape and bool((decoded > 0).all())
    flat = dense.flatten()
    for start in range(0, 30, 8):
        step = float((flat[start : start + 8] - flat.min()).max()) / (2**bits - 1)
        tolerance = 0.5 * step + step * 2**bits * torch.finfo(dtype).eps
        assert bool(((decoded.flatten() - flat)[start : start + 8].abs() <= tolerance * 1.001).all())
    assert float(decoded.flatten()[flat.argmin()]) == float(flat.min())  # the offset
    assert sum(term.bits().values()) == 8 * -(-30 * bits // 8) + 4 * term.steps.element_size() * 8 + 32
    again = from_stored(term.settings(), term.tensors())
    assert torch.equal(again.decode(), decoded)


def test_equal_and_empty_groups_are_no_trouble():
    assert torch.equal(FlatScales.nearest(torch.full((2, 4), 0.5), bits=2, group_size=4).decode(), torch.full((2, 4), 0.5))
    some = FlatScales.nearest(torch.tensor([[0.0, 0.5]]), bits=4, group_size=4).decode()
    assert 0 < float(some[0, 0]) < 1e-6 and float(some[0, 1]) == pytest.approx(0.5, rel=1e-3)
    assert bool((FlatScales.nearest(torch.zeros(2, 2), bits=4, group_size=4).decode() > 0).all())


def test_a_codebook_may_have_them():
    levels, dense = normal_float_levels(3), scales()
    term = FlatScales.nearest(dense, bits=8, group_size=8)
    weight = torch.randn(6, 18, generator=torch.Generator().manual_seed(1)) * 0.01
    wide = term.decode().repeat_interleave(4, dim=1)[:, :18]
    book = Codebook.from_codes(nearest_codes(weight / wide, levels), levels.half()[None, None], term, bits=3, group_size=4)
    plain = Codebook.from_codes(nearest_codes(weight / wide, levels), levels.half()[None, None], term.decode(), bits=3, group_size=4)
    assert torch.equal(book.decode(), plain.decode())
    assert torch.equal(from_stored(book.settings(), book.tensors()).decode(), book.decode())
    with pytest.raises(InputError, match="do not fit codes"):
        Codebook.from_codes(nearest_codes(weight / wide, levels), levels[None, None], term, bits=3, group_size=6)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"bits": 9}, "bits=9"), ({"group_size": 0}, "group_size=0"), ({"scale": -1.0}, "negative"), ({"scale": 1e9}, "wider")],
)
def test_what_cannot_be_stored_is_refused(options, says):
    values = scales() * options.pop("scale", 1.0)
    with pytest.raises(InputError, match=says):
        FlatScales.nearest(values, **({"bits": 4, "group_size": 8} | options))
