from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits import caches
from fewbits.core.cache_method import CacheRun
from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.methods.kvcache.kivi import Kivi
from fewbits.methods.kvcache.vidkv import Vidkv, protection
from fewbits.models.hf_cache import cache_keyword
from fewbits.models.source import open_model

HEADS = 4
RUN = CacheRun(layer=0, start=0, prompt=True, heads=HEADS)


def lost(method, states, side="keys", run=RUN):
    found = (method.seal_keys if side == "keys" else method.seal_values)(states, run).decode()
    return float((found - states).norm() / states.norm())


def noise(tokens=128, width=32, seed=0):
    return torch.randn(tokens, HEADS * width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def real():
    """Keys and values of each layer of the built-in model over one window of held-out text."""
    model = fewbits.load("builtin:tiny-lm")
    window = fewbits.TextSample("builtin:heldout", 1, 128).windows(open_model("builtin:tiny-lm").tokenizer())
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=window, **{cache_keyword(model): cache})
    return [[states[0].transpose(0, 1).flatten(1).float() for states in (layer.keys, layer.values)] for layer in cache.layers]


def mean_lost(method, real, side):
    return sum(lost(method, layer[side == "values"], side) for layer in real) / len(real)


def test_one_bit_spectra_are_those_of_all_complex_frequencies():
    """The published code keeps signs and scales of both parts of every frequency; half of them say the rest."""
    keys, method = noise(width=16), Vidkv(key_bits=1, group_size=32)
    tensor = method.seal_keys(keys, RUN)
    spectra = torch.fft.fft(keys.view(4, 32, HEADS, 16), dim=-1)
    parts = []
    for part in (spectra.real, spectra.imag):
        scales = part.abs().mean(1, keepdim=True)
        parts.append(torch.where(part >= 0, scales, -scales))
    expected = torch.fft.ifft(torch.complex(*parts)).real.reshape(128, -1)
    torch.testing.assert_close(tensor.decode(), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))  # scales are fp16 in one
    binary = tensor.terms[0].parts[0].inner
    assert binary.signs.numel() * 8 == keys.numel()  # where the complex form has twice as many


def test_by_hand():
    values = torch.tensor([[2.0, 1.0], [-1.0, 1.0], [0.1, -1.0], [0.9, 1.0]])
    run = CacheRun(0, 0, True, 1)
    found = Vidkv(group_size=4, residual=4).seal_values(values, run).decode()
    # the mean magnitudes are 1 and 1; above 0.7 lie 2, -1 and 0.9, whose mean is 1.3
    torch.testing.assert_close(found, torch.tensor([[1.3, 1.0], [-1.3, 1.0], [0.0, -1.0], [1.3, 1.0]]), rtol=1e-3, atol=0)
    plain = Vidkv(group_size=4, residual=4, value_scale="none").seal_values(values, run).decode()
    assert plain.tolist() == [[1, 1], [-1, 1], [0, -1], [1, 1]]
    keys = Vidkv(key_bits=1, fourier=False, group_size=4, residual=4)
    torch.testing.assert_close(keys.seal_keys(values, run).decode()[:, 0], torch.tensor([1.0, -1, 1, 1]), rtol=1e-3, atol=0)
    published = replace(keys, levels="published").seal_keys(values, run).decode()
    torch.testing.assert_close(published[:, 1], torch.tensor([1.0, 1, 0, 1]), rtol=1e-3, atol=0)


def test_the_widest_channels_have_two_bits_in_every_run():
    keys = noise()
    keys.view(128, HEADS, 32)[:, 1, [3, 17]] *= 10
    keys.view(128, HEADS, 32)[:, :, 5] += 100  # far from zero, and no wider than others
    method = Vidkv(key_bits=1 + 2 / 32, fourier=False)
    settled = method.settle(keys, keys, RUN)
    assert settled["wide"].tolist() == [8, 0, 2, 0]  # bits 3 and 17
    later = noise(seed=1)  # other channels might be widest here
    found = method.seal_keys(later, replace(RUN, settled=settled))
    grid = found.terms[0].parts[0].decode().view(128, HEADS, 2)
    expected = later.view(128, HEADS, 32)[:, :, [3, 17]]
    step = (expected.view(4, 32, HEADS, 2).amax(1) - expected.view(4, 32, HEADS, 2).amin(1)) / 3
    assert bool(((grid - expected).view(4, 32, HEADS, 2).abs().amax(1) <= 0.51 * step).all())
    assert bool(((found.decode() - later).view(128, HEADS, 32)[:, :, [3, 17]].abs() < 1.5).all())


@pytest.mark.parametrize("key_bits", [1, 1.25, 1.5, 2])
def test_bits_are_those_of_the_formula(key_bits):
    states, method = noise(160, 64), Vidkv(key_bits=key_bits)
    share = key_bits - 1
    keys, values = method.seal_keys(states, RUN), method.seal_values(states, RUN)
    # a bit for every channel and run says which are wide
    assert keys.bits_per_weight() == share * (2 + 32 / 32) + (1 - share) * (1 + 16 / 32) + 1 / 160
    assert values.bits_per_weight() == 1.6 + 16 / 32
    for one in (keys, values):
        again = from_stored(one.settings(), one.tensors())
        assert torch.equal(again.decode(), one.decode())


def test_signs_range_and_kept_means_lose_least_on_a_language_models_states(real):
    method = Vidkv()
    ours, plain = (mean_lost(one, real, "keys") for one in (method, replace(method, fourier=False)))
    assert ours < 0.9 * mean_lost(replace(method, levels="published"), real, "keys")
    assert plain < 0.9 * mean_lost(replace(method, levels="published", fourier=False), real, "keys")
    assert plain < 0.8 * mean_lost(replace(method, levels="extremes", fourier=False), real, "keys")
    assert plain < 0.95 * mean_lost(replace(method, choice="place", fourier=False), real, "keys")
    # the grids of equal bits that every cache could have: as many 2-bit channels, by their place, and 1-bit ones
    assert ours < 0.7 * mean_lost(replace(method, levels="extremes", choice="place", fourier=False), real, "keys")
    kept = mean_lost(method, real, "values")
    assert kept < 0.9 * mean_lost(replace(method, value_scale="mean"), real, "values")
    assert kept < 0.6 * mean_lost(replace(method, value_scale="none"), real, "values")
    assert kept < 0.98 * mean_lost(replace(method, gamma=0.4), real, "values")
    assert kept < 0.98 * mean_lost(replace(method, gamma=1.0), real, "values")
    assert kept < 0.8 * mean_lost(replace(method, values="signs"), real, "values")
    assert mean_lost(replace(method, values="grid"), real, "values") < 0.95 * mean_lost(Kivi(bits=2), real, "values")


def test_spectra_help_where_channels_are_a_few_steady_waves_and_not_on_text(real):
    """Keys whose neighbouring channels are a sum of three waves of steady strength: few frequencies say what all channels say."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (128, HEADS, 3), generator=generator) * 2.0 - 1
    place = torch.arange(16) / 16
    waves = torch.stack([torch.cos(2 * torch.pi * place), torch.sin(4 * torch.pi * place), torch.cos(6 * torch.pi * place)])
    smooth = (signs * torch.tensor([3.0, 2.0, 1.0])) @ waves
    smooth = (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).flatten(1)
    method = Vidkv(key_bits=1)
    assert lost(method, smooth) < 0.25 * lost(replace(method, fourier=False), smooth)
    assert mean_lost(Vidkv(), real, "keys") > mean_lost(Vidkv(fourier=False), real, "keys")


def test_an_offset_saves_channels_far_from_zero():
    keys = noise()
    keys[:, ::4] += 8  # as wide as the others, so in one bit
    method = Vidkv(key_bits=1, fourier=False)
    far = [((one.seal_keys(keys, RUN).decode() - keys)[:, ::4]).norm() for one in (replace(method, offset=True), method)]
    assert far[0] < 0.7 * far[1]


def test_no_group_is_padded():
    states, method = noise(40), Vidkv(group_size=32, fourier=False)
    for side in ("keys", "values"):
        write = method.seal_keys if side == "keys" else method.seal_values
        whole = write(states, replace(RUN, settled=method.settle(states, states, RUN))).decode()
        parts = [write(part, replace(RUN, settled=method.settle(states, states, RUN))).decode() for part in states.split(32)]
        assert torch.equal(whole, torch.cat(parts))
    assert [method.due(count, "keys", True) for count in (31, 32, 70)] == [0, 32, 64]
    assert [method.due(count, "values", False) for count in (127, 128, 300)] == [0, 128, 256]


def test_nothing_is_broken_by_channels_and_groups_without_a_spread():
    states = torch.zeros(64, 128)
    states[:, 1] = 3
    for method in (Vidkv(), Vidkv(offset=True), Vidkv(levels="published"), Vidkv(values="signs"), Vidkv(values="grid")):
        assert lost(method, states, "keys") < 0.01 or method.levels == "published"
        torch.testing.assert_close(method.seal_values(states, RUN).decode(), states, rtol=1e-3, atol=1e-3)


def scene():
    """Embeddings of a prompt: 2 tokens of text, 96 of a video, 6 of a question that resembles 32 of the video's."""
    generator = torch.Generator().manual_seed(0)
    subject = torch.randn(16, generator=generator)
    embeddings = 0.3 * torch.randn(104, 16, generator=generator)
    like = torch.zeros(104, dtype=torch.bool)
    like[20:84:2] = True
    embeddings[like] += subject
    embeddings[98:] += subject
    visual = torch.zeros(104, dtype=torch.bool)
    visual[2:98] = True
    return embeddings, visual, like


def test_visual_tokens_like_the_question_are_protected():
    embeddings, visual, like = scene()
    assert protection(embeddings, visual, share=0.3) == tuple(like.nonzero().flatten().tolist())
    assert protection(embeddings, visual, share=0.9) == protection(embeddings, visual, share=1) == tuple(range(2, 98))
    assert set(protection(embeddings, visual, share=0.1, multiple=8)) < set(protection(embeddings, visual, share=0.3))


def test_protected_values_have_two_bits_and_keys_and_other_values_are_as_before():
    embeddings, visual, like = scene()
    states, method = noise(96), Vidkv(residual=32)
    protecting = replace(method, protected=protection(embeddings, visual, share=0.3))
    chosen = like[:96]
    plain, found = method.seal_values(states, RUN), protecting.seal_values(states, RUN)
    grid = replace(method, values="grid").seal_values(states[chosen], RUN).decode()
    others = method.seal_values(states[~chosen], RUN).decode()
    assert torch.equal(found.decode()[chosen], grid) and torch.equal(found.decode()[~chosen], others)
    assert torch.equal(protecting.seal_keys(states, RUN).decode(), method.seal_keys(states, RUN).decode())
    # 96 tokens: 20 bytes of ternary codes a channel; of 32 and 64: 8 and 13, another fp16 number for the 32, and a bit a token
    assert plain.bits_per_weight() == (160 + 3 * 16) / 96
    assert found.bits_per_weight() == pytest.approx((64 + 2 * 16 + 104 + 2 * 16) / 96 + 1 / 128)


def test_positions_are_those_of_the_prompt_in_every_run_and_behind_padding():
    states, method = noise(64), Vidkv(residual=32, protected=tuple(range(32)))
    grid, few = (method._few(states[:32]).decode() for method in (Vidkv(values="grid"), Vidkv()))
    assert torch.equal(method.seal_values(states, RUN).decode()[:32], grid)
    assert torch.equal(method.seal_values(states[:32], replace(RUN, start=32)).decode(), few)
    assert torch.equal(method.seal_values(torch.cat([states[32:], states[:32]]), replace(RUN, padding=32)).decode()[32:], grid)
    half = replace(method, protected=(0,)).seal_values(states, replace(RUN, padding=40)).decode()
    torch.testing.assert_close(half[40], states[40], rtol=2e-3, atol=2e-3)  # alone in its group, so met


def test_nothing_is_protected_unless_it_is_said_which_tokens_are_visual():
    embeddings, visual, _ = scene()
    with pytest.raises(InputError, match="no token of the prompt is visual"):
        protection(embeddings, torch.zeros_like(visual))
    with pytest.raises(InputError, match="no token of the prompt is text"):
        protection(embeddings, torch.ones_like(visual))
    with pytest.raises(InputError, match=r"bool \[104\] would be"):
        protection(embeddings, visual.float())


@torch.no_grad()
def test_in_a_model_the_protected_tokens_of_the_prompt_are_read_better():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).eval()
    tokens = torch.randint(61, (1, 104), generator=torch.Generator().manual_seed(1))
    embeddings, visual, like = scene()
    dense = DynamicCache(config=model.config)
    model(input_ids=tokens, **{cache_keyword(model): dense})
    errors = []
    for protected in ((), protection(embeddings, visual, share=0.3)):
        cache = caches.open(model, "vidkv", residual=32, protected=protected)
        model(input_ids=tokens, **{cache_keyword(model): cache})
        cache.flush()
        found = cache.layers[1].read("values")[0]
        assert torch.equal(found[:, 96:], dense.layers[1].values[0, :, 96:])  # what no group holds yet is exact
        errors.append((found - dense.layers[1].values[0])[:, like].norm())
        assert cache.memory()["bits"]["settled"] == 2 * 8 * 2  # which of 16 channels, in both layers
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"key_bits": 2.5}, "key_bits=2.5"),
        ({"residual": 100}, "multiple of group_size=32"),
        ({"gamma": -1}, "gamma=-1"),
        ({"protected": (3, -1)}, "no position"),
        ({"offset": True, "levels": "published"}, "offset=True"),
    ],
)
def test_wrong_fields(fields, text):
    with pytest.raises(InputError, match=text):
        Vidkv(**fields)
