import pytest
import torch

from fewbits.core.cache_method import CacheRun
from fewbits.core.errors import InputError
from fewbits.methods.kvcache.kivi import Kivi

RUN = CacheRun(layer=0, start=0, prompt=True, heads=2)


def outlier_channels(tokens=64, channels=32):
    """Keys as they are found in models: a few channels far from zero and wide."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(tokens, channels, generator=generator)
    keys[:, :3] = 8 + 4 * keys[:, :3]
    return keys


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_each_group_spans_its_extremes(bits):
    method, keys = Kivi(bits=bits, group_size=16, residual=16), outlier_channels()
    for found, matrix in ((method.seal_keys(keys, RUN).decode(), keys.T), (method.seal_values(keys, RUN).decode().T, keys)):
        found = found.T if matrix.shape == keys.shape else found
        matrix, rounded = (one.reshape(-1, 16) for one in (matrix, found.T if found.shape != matrix.shape else found))
        step = (matrix.amax(1) - matrix.amin(1)) / (2**bits - 1)
        # half a step, and what fp16 leaves of the scale and the zero point
        assert bool(((matrix - rounded).abs().amax(1) <= 0.5 * step + 4e-3 * matrix.abs().amax(1)).all())


def test_by_hand():
    keys = torch.tensor([[0.0, -1.0], [1.0, 1.0], [2.0, 3.0], [3.0, 4.9]])
    found = Kivi(bits=2, group_size=2, residual=2).seal_keys(keys, CacheRun(0, 0, True, 1))
    # two tokens span each group, so both are met; codes are 0 and 3
    assert torch.allclose(found.decode(), keys, atol=4e-3)
    assert found.terms[0].inner.unpacked_codes().tolist() == [[0, 3, 0, 3], [0, 3, 0, 3]]


def test_keys_by_channel_lose_less_than_keys_by_token():
    keys = outlier_channels()
    method = Kivi(bits=2, group_size=32, residual=32)
    channel = (method.seal_keys(keys, RUN).decode() - keys).square().sum()
    token = (method.seal_values(keys, RUN).decode() - keys).square().sum()
    assert method.seal_keys(keys, RUN).bits_per_weight() == method.seal_values(keys, RUN).bits_per_weight() == 3.0
    assert channel < 0.5 * token


def test_keys_wait_for_a_full_residual_and_values_leave_one_by_one():
    method = Kivi(group_size=32, residual=128)
    assert [method.due(n, "keys", True) for n in (1, 127, 128, 300)] == [0, 0, 128, 256]
    assert [method.due(n, "values", False) for n in (1, 128, 129, 300)] == [0, 0, 1, 172]


@pytest.mark.parametrize(
    ("fields", "text"), [({"bits": 9}, "bits=9"), ({"residual": 100}, "multiple of group_size=32"), ({"group_size": 0}, "group_size=0")]
)
def test_wrong_fields(fields, text):
    with pytest.raises(InputError, match=text):
        Kivi(**fields)
