from dataclasses import replace

import pytest
import torch

import fewbits
from fewbits import caches
from fewbits.core.cache_method import CacheRun
from fewbits.core.errors import InputError
from fewbits.evaluation.caches import score_cache
from fewbits.methods.kvcache.gear import Gear
from fewbits.methods.kvcache.kivi import Kivi
from fewbits.models.source import open_model

RUN = CacheRun(layer=0, start=0, prompt=True, heads=4)


def coherent(tokens=128, heads=4, width=32):
    """What many tokens share, different in each head, noise, and a few entries far out."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(tokens, 4, generator=generator) @ torch.randn(4, width, generator=generator) for _ in range(heads)]
    states = torch.cat(parts, 1) + 0.5 * torch.randn(tokens, heads * width, generator=generator)
    far = torch.rand(states.shape, generator=generator) < 0.01
    return torch.where(far, 20 * torch.randn(states.shape, generator=generator), states)


def lost(method, states=None, run=RUN):
    states = coherent() if states is None else states
    found = method.seal_keys(states, run).decode(), method.seal_values(states, run).decode()
    return [float((one - states).norm() / states.norm()) for one in found]


def test_every_part_helps():
    full = Gear(rank=4)
    order = [replace(full, prompt_rank=0, outliers=0.0), replace(full, prompt_rank=0), replace(full, outliers=0.0), full]
    keys, values = zip(*(lost(method) for method in order), strict=True)
    for errors in (keys, values):
        assert errors[3] < 0.9 * min(errors[1:3]) and max(errors[1:3]) < errors[0]


def test_factors_for_each_head_beat_one_pair_for_all():
    assert all(one < 0.95 * all_heads for one, all_heads in zip(lost(Gear()), lost(Gear(per_head=False)), strict=True))


def test_outliers_are_met_within_what_fp16_leaves():
    states, method = coherent(), Gear(outliers=0.1)
    for found, vectors in ((method.seal_keys(states, RUN).decode().T, states.T), (method.seal_values(states, RUN).decode(), states)):
        count = int(0.1 * vectors.shape[1] / 2)
        for far in (vectors.topk(count).indices, (-vectors).topk(count).indices):
            torch.testing.assert_close(found.gather(1, far), vectors.gather(1, far), rtol=2e-3, atol=2e-3)


def test_low_rank_is_of_what_the_grid_lacks():
    """With factors of full rank nothing is lost, whatever the grid; of the states themselves, they would not know the grid."""
    method = Gear(bits=1, prompt_rank=32, outliers=0.0)
    assert max(lost(method)) < 2e-3


def test_bits_are_those_of_the_formula():
    states, method = coherent(), Gear(group_size=64, prompt_rank=4, outliers=0.04)
    keys, values = method.seal_keys(states, RUN), method.seal_values(states, RUN)
    # 128 tokens, 128 channels, 4 heads of 32: 2 of each end of every vector, positions in 7 bits, padded to whole bytes
    factors = 4 * 16 * (128 + 32) / (128 * 32)
    outliers = (4 * 16 + 32) / 128
    for one in (keys, values):
        assert one.bits_per_weight() == pytest.approx(2 + 32 / 64 + factors + outliers)
    plain = Gear(layout="kcvt", prompt_rank=0, outliers=0.0)
    assert plain.seal_keys(states, RUN).bits_per_weight() == pytest.approx(2 + 32 / 128)


def test_runs_behind_the_prompt_have_their_own_rank():
    later = replace(RUN, prompt=False)
    ranks = [Gear().seal_keys(coherent()[:64], run).terms[1].parts[0].left.shape[1] for run in (RUN, later)]
    assert ranks == [4, 2]


@pytest.mark.slow
def test_on_the_built_in_model_it_loses_least_with_all_parts():
    model = fewbits.load("builtin:tiny-lm")
    windows = fewbits.TextSample("builtin:heldout", 4, 192).windows(open_model("builtin:tiny-lm").tokenizer())
    full = Gear(group_size=32, buffer=32)
    plain = replace(full, prompt_rank=0, rank=0, outliers=0.0)
    methods = [full, replace(full, outliers=0.0), replace(full, prompt_rank=0, rank=0), plain, Kivi(bits=2, group_size=32, residual=32)]
    kl = [float(score_cache(model, windows, lambda one=one: caches.open(model, one), prompt=160)[0].forward_kl.mean()) for one in methods]
    assert kl[0] < min(kl[1:3]) and max(kl[1:3]) < kl[3] and kl[0] < kl[4]


@pytest.mark.parametrize(
    ("fields", "text"), [({"bits": 0}, "bits=0"), ({"buffer": 100}, "multiple of group_size=64"), ({"outliers": 0.7}, "outliers=0.7")]
)
def test_wrong_fields(fields, text):
    with pytest.raises(InputError, match=text):
        Gear(**fields)
