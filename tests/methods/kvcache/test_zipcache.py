from dataclasses import dataclass, replace

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits import caches
from fewbits.core.cache_method import CacheRun
from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.methods.kvcache.zipcache import Zipcache
from fewbits.models.attention_probe import column_scores, probe_rows
from fewbits.models.hf_cache import cache_keyword
from fewbits.models.source import open_model

HEADS = 4


def told(tokens, salience=None, **fields):
    """A run whose tokens are attended to as `salience` says, or at random."""
    generator = torch.Generator().manual_seed(7)
    salience = torch.rand(HEADS, tokens, generator=generator) if salience is None else salience
    return CacheRun(layer=0, start=0, prompt=True, heads=HEADS, salience=salience, **fields)


def states(tokens=100, width=16, seed=0):
    return torch.randn(tokens, HEADS * width, generator=torch.Generator().manual_seed(seed))


def lost(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.29, 0.6, 1.0])
def test_tokens_stay_in_their_place_within_a_step_of_their_class(per_head, share):
    matrix, run = states(), told(100)
    method = Zipcache(low_share=share, low_bits=4, high_bits=8, per_head=per_head, scaling="none")
    mask = method.salient(run, 100)
    assert mask.shape == (HEADS if per_head else 1, 100) and set((~mask).sum(1).tolist()) == {round(share * 100)}
    mask = mask.expand(HEADS, -1)
    spread = float(matrix.max() - matrix.min())
    for tensor in (method.seal_keys(matrix, run), method.seal_values(matrix, run)):
        error = (tensor.decode() - matrix).view(100, HEADS, -1).abs().amax(2).T
        assert float(torch.where(mask, error, 0.0).max()) < 0.52 * spread / 255
        assert float(torch.where(mask, 0.0, error).max()) < 0.52 * spread / 15
        again = from_stored(tensor.settings(), tensor.tensors())
        assert torch.equal(again.decode(), tensor.decode())


def test_the_most_attended_tokens_of_each_head_are_the_salient_ones():
    salience = torch.tensor([[0.1, 0.5, 0.2, 0.9, 0.3], [0.9, 0.5, 0.2, 0.1, 0.3], [0.0, 0.0, 0.0, 0.0, 0.0], [0.2, 0.3, 0.2, 0.1, 0.2]])
    found = Zipcache().salient(told(5, salience), 5)
    assert found.int().tolist() == [[0, 1, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 0, 0, 1]]
    shared = Zipcache(per_head=False).salient(told(5, salience), 5)
    assert shared.int().tolist() == [[1, 1, 0, 0, 0]]  # sums: 1.2, 1.3, 0.6, 1.1, 0.8


def test_keys_have_a_grid_for_every_channel_and_class():
    keys, run = states(50), told(50)
    method = Zipcache()
    found, mask = method.seal_keys(keys, run).decode().view(50, HEADS, -1), method.salient(run, 50)
    for head in range(HEADS):
        for where, bits in ((mask[head], 4), (~mask[head], 2)):
            exact = keys.view(50, HEADS, -1)[where, head]
            step = (exact.amax(0) - exact.amin(0)) / (2**bits - 1)
            assert bool(((found[where, head] - exact).abs() <= 0.5 * step + 4e-3 * exact.abs().amax()).all())
            assert all(len(one.unique()) <= 2**bits for one in found[where, head].T)


def test_bits_are_those_of_the_formula():
    run, method = told(200), Zipcache()
    keys, values = method.seal_keys(states(200), run), method.seal_values(states(200), run)
    # 120 tokens in 2 bits and 80 in 4, flags of 25 bytes a head; 64 channels of 4 heads
    codes, flags = (120 * 2 + 80 * 4) / 200, 1 / 16
    assert keys.bits_per_weight() == pytest.approx(codes + flags + 64 / 200)
    assert values.bits_per_weight() == pytest.approx(codes + flags + 32 / 64 + 16 / 200)
    shared = replace(method, per_head=False).seal_keys(states(200), run)
    assert shared.bits_per_weight() == pytest.approx(codes + flags / HEADS + 64 / 200)


def test_a_wide_channel_costs_other_channels_nothing():
    values, run = states(), told(100)
    wide = values.clone()
    wide[:, 5] *= 50
    others = torch.arange(64) != 5

    def of_others(scaling, matrix):
        found = Zipcache(scaling=scaling).seal_values(matrix, run).decode()
        return lost(found[:, others], matrix[:, others])

    assert of_others("max", wide) < 1.05 * of_others("max", values)
    assert of_others("root", wide) < 2.5 * of_others("root", values)  # the root leaves the root of 50
    assert of_others("none", wide) > 3 * of_others("none", values)


def test_scales_of_one_are_plain_grids():
    values = states()
    values = values / values.abs().amax(0)
    for scaling in ("root", "max"):
        found = Zipcache(scaling=scaling).seal_values(values, told(100)).decode()
        assert torch.equal(found, Zipcache(scaling="none").seal_values(values, told(100)).decode())


def test_nothing_is_broken_by_channels_without_values():
    matrix = torch.zeros(20, 64)
    matrix[:, 1] = 3
    for method in (Zipcache(), Zipcache(scaling="max"), Zipcache(low_share=1), Zipcache(low_share=0)):
        for tensor in (method.seal_keys(matrix, told(20)), method.seal_values(matrix, told(20))):
            torch.testing.assert_close(tensor.decode(), matrix, rtol=2e-2, atol=2e-2)


def test_padding_is_never_salient_and_widens_no_range():
    matrix = states(60)
    salience = torch.rand(HEADS, 60, generator=torch.Generator().manual_seed(3))
    matrix[0] *= 100  # the first token of text, which stands in for padding, and is attended to most
    salience[:, 0] = 2
    padded = torch.cat([matrix[:1].expand(30, -1), matrix])
    run = told(90, torch.cat([torch.rand(HEADS, 30), salience], 1), padding=30)
    for method in (Zipcache(), Zipcache(per_head=False)):
        assert torch.equal(method.salient(run, 90)[:, 30:], method.salient(told(60, salience), 60))
        assert not bool(method.salient(run, 90)[:, :30].any())
        for write in (method.seal_keys, method.seal_values):
            assert torch.equal(write(padded, run).decode()[30:], write(matrix, told(60, salience)).decode())
    assert torch.equal(Zipcache().salient(replace(run, start=30), 90), Zipcache().salient(replace(run, padding=0), 90))
    assert not bool(Zipcache().salient(replace(run, padding=90), 90).any())


def test_a_line_that_the_question_asks_for_is_kept_where_recency_loses_it():
    """Of 200 tokens those from 40 to 47 are what the last ones, and few before, look for."""
    generator = torch.Generator().manual_seed(0)
    width, line, asking = 16, slice(40, 48), slice(190, 200)
    key, query = torch.randn(1, HEADS, 200, width, generator=generator), 0.3 * torch.randn(1, 2 * HEADS, 200, width, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(HEADS, width, generator=generator), dim=1)
    key[0, :, line] += 4 * direction[:, None]
    query[0, :, asking] += 4 * direction.repeat_interleave(2, 0)[:, None]
    values = states(200)
    sums, counts = column_scores(query, key, None, width**-0.5, 0.1)
    run, recent = told(200, sums[0] / counts[0]), told(200, torch.arange(200.0).expand(HEADS, -1))
    method = Zipcache()
    assert bool(method.salient(run, 200)[:, line].all()) and not bool(method.salient(recent, 200)[:, line].any())

    def answer(keys, values):
        keys, values = (one.view(200, HEADS, width).transpose(0, 1).repeat_interleave(2, 0) for one in (keys, values))
        return torch.softmax(query[0, :, asking] @ keys.transpose(1, 2) * width**-0.5, 2) @ values

    keys = key[0].transpose(0, 1).flatten(1)
    errors = [
        lost(answer(method.seal_keys(keys, one).decode(), method.seal_values(values, one).decode()), answer(keys, values))
        for one in (run, recent)
    ]
    assert errors[0] < 0.6 * errors[1]


@dataclass(frozen=True)
class Ranked(Zipcache):
    """The tokens' order comes from elsewhere."""

    rule: str = "normalized"

    def salient(self, run, tokens):
        order = {
            "normalized": run.salience,
            "accumulated": run.salience * torch.arange(tokens, 0, -1),  # all queries of the prompt are probes here
            "random": torch.rand(run.salience.shape, generator=torch.Generator().manual_seed(run.layer)),
            "least": -run.salience,
        }[self.rule]
        return super().salient(replace(run, salience=order), tokens)


@pytest.fixture(scope="module")
def model():
    return fewbits.load("builtin:tiny-lm")


@pytest.fixture(scope="module")
def windows():
    return fewbits.TextSample("builtin:heldout", 4, 256).windows(open_model("builtin:tiny-lm").tokenizer())


@torch.no_grad()
def sealed(model, method, prompt):
    cache = caches.open(model, method)
    model(input_ids=prompt, **{cache_keyword(model): cache})
    salience = [layer.salience for layer in cache.compressed()]
    cache.flush()
    return cache, salience


@pytest.mark.slow
@torch.no_grad()
def test_the_order_of_tokens_matters_in_the_built_in_model(model, windows):
    """The prompt is sealed, then 64 tokens of text are read at once, which see each other exactly."""
    dense = torch.log_softmax(model(input_ids=windows, use_cache=False).logits[:, 192:], -1)

    def kl(method):
        cache, _ = sealed(model, method, windows[:, :192])
        found = torch.log_softmax(model(input_ids=windows[:, 192:], **{cache_keyword(model): cache}).logits, -1)
        return float((dense.exp() * (dense - found)).sum(-1).mean())

    normalized, accumulated, random, least = (
        kl(Ranked(rule=rule, probe_share=1.0)) for rule in ("normalized", "accumulated", "random", "least")
    )
    assert normalized < 0.95 * accumulated and accumulated < 0.95 * random and random < least
    assert kl(Zipcache(low_share=0)) < 0.3 * normalized  # 4 bits for all
    assert max(normalized, kl(Zipcache())) < 0.8 * random < kl(Zipcache(low_share=1))  # 2 bits for all


def test_a_tenth_of_the_queries_find_most_of_what_all_find(model, windows):
    _, exact = sealed(model, Zipcache(probe_share=1.0), windows[:1, :192])
    _, probed = sealed(model, Zipcache(probe_share=0.1), windows[:1, :192])
    seen = (probe_rows(192, 0.1)[:, None] >= torch.arange(192)).sum(0).clamp(min=1)
    best, found, over_all = (
        torch.cat([Zipcache().salient(told(192, layer[0]), 192) for layer in layers])
        for layers in (exact, probed, [layer * seen / torch.arange(192, 0, -1) for layer in probed])
    )
    overlap, of_other = (float((best & one).sum() / best.sum()) for one in (found, over_all))
    assert overlap > 0.6 and of_other > 0.5  # by chance 0.4; with the count among all queries in place of that among probes


def test_channel_scales_help_tokenwise_grids_on_a_language_models_keys(model, windows):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=windows[:1, :192], **{cache_keyword(model): cache})
    keys = [layer.keys[0].transpose(0, 1).flatten(1) for layer in cache.layers]
    ours, plain = (
        sum(lost(Zipcache(scaling=scaling).seal_values(one, told(192)).decode(), one) for one in keys) for scaling in ("root", "none")
    )
    assert ours < 0.95 * plain


@torch.no_grad()
def test_a_prompt_is_sealed_whole_and_generated_tokens_in_runs():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    small = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, initializer_range=0.3)).eval()
    tokens = torch.randint(1, 61, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    cache = caches.open(small, "zipcache", gap=5)
    given = {cache_keyword(small): cache}
    small.generate(tokens, attention_mask=mask, max_new_tokens=13, do_sample=False, pad_token_id=0, **given)
    layer = cache.compressed()[1]
    side = layer.sides["values"]
    assert [run.shape[0] for run in side.sealed[0]] == [11, 5, 5] and side.exact.shape[2] == 2


def test_attention_must_be_measured():
    with pytest.raises(InputError, match="nobody measured"):
        Zipcache().seal_keys(states(), CacheRun(0, 0, True, HEADS))


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"low_share": 1.2}, "low_share=1.2"), ({"high_bits": 9}, "high_bits=9"), ({"low_bits": 0}, "low_bits=0"), ({"gap": 0}, "gap=0")],
)
def test_wrong_fields(fields, text):
    with pytest.raises(InputError, match=text):
        Zipcache(**fields)
