import pytest
import torch

from fewbits.core.cache_method import CacheRun
from fewbits.core.errors import InputError
from fewbits.methods.kvcache.rotated import Rotated

RUN = CacheRun(layer=0, start=0, prompt=True, heads=4)


def states(tokens=50, channels=128):
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(tokens, channels, generator=generator)
    found[:, 5] *= 30
    return found


def lost(method):
    return float((method.seal_keys(states(), RUN).decode() - states()).square().mean())


def test_rotation_spreads_outlier_channels():
    assert lost(Rotated(bits=4)) < 0.25 * lost(Rotated(bits=4, rotate=False))
    assert Rotated().seal_keys(states(), RUN).bits_per_weight() == 4 + 32 / 128


def test_fewer_bits_lose_more_and_many_lose_little():
    errors = [lost(Rotated(bits=bits)) for bits in (8, 4, 3, 2)]
    assert errors == sorted(errors) and errors[0] < 1e-3 * float(states().square().mean())


def test_runs_join():
    method = Rotated(bits=3)
    first, second = method.seal_values(states()[:20], RUN), method.seal_values(states()[20:], RUN)
    assert torch.equal(first.stacked(second).decode(), torch.cat([first.decode(), second.decode()]))
    assert torch.equal(first.stacked(second).terms[0].codes, method.seal_values(states(), RUN).terms[0].codes)


def test_wrong_fields_and_channels():
    with pytest.raises(InputError, match="bits=9"):
        Rotated(bits=9)
    with pytest.raises(InputError):
        Rotated().seal_keys(torch.ones(3, 11), RUN)
