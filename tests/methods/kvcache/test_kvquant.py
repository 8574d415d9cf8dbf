import dataclasses
import functools
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits import caches
from fewbits.core.cache_method import CacheRun
from fewbits.core.errors import InputError
from fewbits.methods.kvcache.kvquant import Kvquant, channel_ranges, extremes
from fewbits.models.cache_states import CacheStates, record_states
from fewbits.models.hf_cache import cache_keyword
from fewbits.models.source import open_model
from fewbits.solvers.kmeans import clustering_error, exact_levels

CHANNELS = 16


def states(tokens=100, windows=2, seed=0):
    """Keys with channels far from zero and wide, values with wide tokens, and gradients that differ between channels."""
    generator = torch.Generator().manual_seed(seed)
    keys, values, *slopes = (torch.randn(windows, tokens, CHANNELS, generator=generator) for _ in range(4))
    keys[..., :3] = 9 + 3 * keys[..., :3]
    values = values * torch.rand(windows, tokens, 1, generator=generator).exp() ** 2
    # the loss rises more with what is high in its channel
    steep = [one * torch.where(numbers > numbers.mean((0, 1)), 4, 1) for one, numbers in zip(slopes, (keys, values), strict=True)]
    return CacheStates(keys, values, *(one * torch.rand(CHANNELS, generator=generator) ** 2 for one in steep))


@functools.cache
def fitted(method):
    return method.fit(states())


def run_of(method, start=0, padding=0):
    return CacheRun(layer=0, start=start, prompt=True, heads=2, tables=fitted(method), padding=padding)


def test_entries_outside_of_the_ranges_are_met_bit_for_bit_and_the_others_within_a_step():
    method = Kvquant(bits=4, outliers=0.05)
    run, keys = run_of(method, start=3), states(seed=1).keys[0]
    low, high = (run.tables["keys.centers"].float() + sign * run.tables["keys.scales"].float() for sign in (-1, 1))
    found, outside = method.seal_keys(keys, run).decode(), (keys < low) | (keys > high)
    assert 0.02 < float(outside.float().mean()) < 0.15
    assert torch.equal(found[outside], keys[outside].half().float())
    levels = run.tables["keys.levels"].float().flatten()
    gap = torch.cat([levels.diff(), levels[:1] + 1, 1 - levels[-1:]]).max() * run.tables["keys.scales"].float()
    assert bool(((found - keys).abs() <= gap + 0.01).all())
    values = states(seed=1).values[0]
    found = method.seal_values(values, run).decode()
    for far in (values.topk(1).indices, (-values).topk(1).indices):
        assert torch.equal(found.gather(1, far), values.gather(1, far).half().float())


def test_ranges_and_counts_by_hand():
    columns = torch.arange(101.0)[:, None] * torch.tensor([1.0, -2.0])
    centers, scales = channel_ranges(columns[torch.randperm(101)], 0.1)  # percentiles 5 and 95
    assert torch.equal(centers, torch.tensor([50.0, -100.0]).half()) and torch.equal(scales, torch.tensor([45.0, 90.0]).half())
    assert torch.equal(channel_ranges(columns, 0.0)[1], torch.tensor([50.0, 100.0]).half())
    assert extremes(torch.randn(2, 4096), 0.01).sum(1).tolist() == [42, 42]  # the paper's 21 of each end
    assert torch.equal(extremes(torch.tensor([[3.0, 1.0, 2.0, 5.0]]), 0.01)[0], torch.tensor([False, True, False, True]))
    assert not extremes(torch.randn(3, 9), 0.0).any()
    constant = torch.full((5, 1), 3.001)
    assert float(((constant - channel_ranges(constant, 0.01)[0].float()) / channel_ranges(constant, 0.01)[1].float()).abs().max()) <= 1


def test_first_tokens_of_each_sequence_are_kept_wherever_its_padding_ends():
    method, keys = Kvquant(bits=2, sink=2), states(seed=2).keys[0, :10]
    for padding in (0, 4):
        found = method.seal_keys(keys, run_of(method, padding=padding)).decode()
        exact = (found == keys.half().float()).all(1)
        assert exact.nonzero().flatten().tolist() == [padding, padding + 1]
    later = method.seal_keys(keys, run_of(method, start=4, padding=3)).decode()  # the second token of text comes first here
    assert (later == keys.half().float()).all(1).nonzero().flatten().tolist() == [0]


def test_the_fit_leaves_out_first_tokens_and_outliers():
    given = states()
    spoiled = dataclasses.replace(given, keys=given.keys.clone(), values=given.values.clone())
    spoiled.keys[:, 0], spoiled.values[:, 0] = 1e4, -1e4
    method, naive = Kvquant(sink=1), Kvquant(sink=0)
    one, two = fitted(method), method.fit(spoiled)
    assert all(torch.equal(one[name], two[name]) for name in one)
    # one of every hundred tokens lies beyond the 99.5th percentile: the ranges of all channels reach for it
    assert float(naive.fit(spoiled)["keys.scales"][5]) > 2 * float(one["keys.scales"][5])


@pytest.mark.parametrize("side", ["keys", "values"])
def test_levels_are_those_of_the_weighted_objective(side):
    """No other table has a smaller weighted error than the one fitted with these weights, and it is that of the exact solution."""
    given = states(tokens=45)
    rows, slopes = (getattr(given, f"{side}")[:, 1:].flatten(0, 1), getattr(given, f"{side[:-1]}_gradients")[:, 1:].flatten(0, 1))
    method = Kvquant(bits=3, outliers=0.02)
    tables = method.fit(given)
    if side == "keys":
        wide = tables["keys.scales"].float().expand_as(rows)
        normal = (rows - tables["keys.centers"].float()) / wide
        inside = normal.abs() <= 1
    else:
        inside = ~extremes(rows, 0.02)
        low, high = rows.masked_fill(~inside, 99.0).amin(1, keepdim=True), rows.masked_fill(~inside, -99.0).amax(1, keepdim=True)
        wide = ((high - low) / 2).expand_as(rows)
        normal = (rows - (high + low) / 2) / wide
    weights = (slopes * wide).square()
    values, order = normal[inside].double().sort()
    weights = weights[inside].double()[order]

    def objective(levels):
        return float(clustering_error(values[None], weights[None], levels.float().reshape(1, -1)))

    best = objective(exact_levels(values[None], weights[None], 8)[0])
    found = objective(tables[f"{side}.levels"])
    assert found <= 1.05 * best
    fields = ({"weights": "none"}, {"weights": "fisher"}, {"levels": "normal_float"})
    others = [objective(dataclasses.replace(method, **one).fit(given)[f"{side}.levels"]) for one in fields]
    assert found <= 1.001 * min(others) and others[0] > 1.05 * found and others[2] > 1.05 * found


def test_q_norm_keeps_mean_and_spread_of_what_is_coded():
    method = Kvquant(bits=2, outliers=0.0, sink=0, q_norm=True)
    tables = method.fit(states())
    keys = states().keys.flatten(0, 1)
    normal = (keys - tables["keys.centers"].float()) / tables["keys.scales"].float()
    coded = tables["keys.levels"].float().flatten()[torch.bucketize(normal, tables["keys.edges"])]
    plain = dataclasses.replace(method, q_norm=False).fit(states())
    before = plain["keys.levels"].float().flatten()[torch.bucketize(normal, plain["keys.edges"])]
    assert torch.equal(plain["keys.edges"], tables["keys.edges"])
    assert abs(float(coded.std() - normal.std())) < 2e-3 < 0.05 * float(normal.std()) < abs(float(before.std() - normal.std()))
    assert abs(float(coded.mean() - normal.mean())) < 2e-3


def test_bits_are_those_of_the_formula():
    method = Kvquant(bits=3, outliers=0.05, sink=1)
    run, given = run_of(method), states(seed=3)
    keys, values = given.keys[0], given.values[0]
    sealed = method.seal_keys(keys, run)
    outside = int((((keys - run.tables["keys.centers"].float()) / run.tables["keys.scales"].float()).abs() > 1)[1:].sum())
    layer = (2**3 + 2 * CHANNELS) * 16
    # codes, a byte for each token's count, 16 bits and a byte for each outlier, one fp16 token, levels and ranges
    assert sum(sealed.bits().values()) == 99 * CHANNELS * 3 + 99 * 8 + outside * 24 + CHANNELS * 16 + layer
    sealed = method.seal_values(values, run)
    assert sum(sealed.bits().values()) == 99 * (CHANNELS * 3 + 32 + 2 * 24) + CHANNELS * 16 + 2**3 * 16
    capped = dataclasses.replace(method, capped_keys=True).seal_keys(keys, run)
    assert sum(capped.bits().values()) == 99 * (CHANNELS * 3 + 2 * 24) + CHANNELS * 16 + layer


def small(layers=2):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, initializer_range=0.2)).eval()


WINDOWS = torch.randint(1, 64, (3, 40), generator=torch.Generator().manual_seed(0))


def test_recorded_keys_and_gradients_are_those_of_the_projection():
    """Against autograd at k_proj and v_proj: keys turned back are their outputs, and so are the gradients."""
    model, written = small(), {}
    for index, layer in enumerate(model.model.layers):
        for side in ("k", "v"):

            def keep(module, given, output, name=(index, side)):
                output.retain_grad()
                written.setdefault(name, []).append(output)

            layer.self_attn.get_submodule(f"{side}_proj").register_forward_hook(keep)
    seen = []
    found = dict(record_states(small(), WINDOWS, rotated=False, gradients=True, report=lambda *said: seen.append(said)))
    assert seen[-1] == (3, 3, "window 3 of 3") and len(seen) == 3
    for window in WINDOWS:
        model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
    for index, states in found.items():
        for side, ours, slopes in (("k", states.keys, states.key_gradients), ("v", states.values, states.value_gradients)):
            theirs = torch.cat(written[index, side])
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            gradient = torch.cat([one.grad for one in written[index, side]])
            torch.testing.assert_close(slopes, gradient, rtol=1e-4, atol=1e-3 * float(gradient.abs().max()))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in small().parameters())


def test_recording_leaves_the_model_as_it_was():
    model = small()
    model.lm_head.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    list(record_states(model, WINDOWS[:1], gradients=True))
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


@pytest.fixture(scope="module")
def calibrated():
    """A small model, the method, and its tables."""
    model, method = small(), Kvquant(bits=3, outliers=0.05)
    return model, method, caches.calibrate(model, method, text=WINDOWS)


@torch.no_grad()
def feed(model, cache, tokens, mask=None, prompt=12):
    mask = torch.ones_like(tokens) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = []
    for start, end in [(0, prompt), *((place, place + 1) for place in range(prompt, tokens.shape[1]))]:
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end], cache_keyword(model): cache}
        found.append(model(input_ids=tokens[:, start:end], **given).logits)
    return torch.cat(found, 1)


def test_a_batch_with_padding_is_its_sequences_alone(calibrated):
    model, method, tables = calibrated
    tokens, mask = WINDOWS[:2, :20].clone(), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    both = caches.open(model, method, tables=tables)
    together = feed(model, both, tokens, mask)
    for row, padding in ((0, 5), (1, 0)):
        alone = caches.open(model, method, tables=tables)
        feed(model, alone, tokens[row : row + 1, padding:], prompt=12 - padding)
        for side in ("keys", "values"):
            one, two = both.layers[0].read(side)[row, :, padding:], alone.layers[0].read(side)[0]
            torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    plain = feed(model, DynamicCache(config=model.config), tokens, mask)
    exact = Kvquant(bits=8, outliers=0.05, levels="uniform")
    many = feed(model, caches.open(model, exact, tables=caches.calibrate(model, exact, text=WINDOWS)), tokens, mask)
    apart = [float((one - plain)[mask.bool()].abs().max()) for one in (many, together)]
    assert apart[0] < 0.25 * apart[1]


def test_a_token_never_changes_what_was_written_before(calibrated):
    """Also where later tokens are far out of all ranges; a cache that took its ranges anew would write other codes."""
    model, method, tables = calibrated
    method_run = CacheRun(0, 1, False, 2, tables=tables[0])
    keys = next(record_states(model, WINDOWS, rotated=False))[1].keys[0]
    alone = method.seal_keys(keys[:20], method_run)
    far = method.seal_keys(torch.cat([keys[:20], 50 * keys[20:]]), method_run)
    assert torch.equal(alone.decode(), far.decode()[:20])
    cache = caches.open(model, method, tables=tables)
    feed(model, cache, WINDOWS[:1, :16])
    before = {side: state.sealed[0][0] for side, state in cache.layers[1].sides.items()}
    old = {side: torch.cat([run.decode() for run in state.sealed[0]]) for side, state in cache.layers[1].sides.items()}
    with torch.no_grad():
        for token in WINDOWS[0, 16:36]:
            model(input_ids=token[None, None], **{cache_keyword(model): cache})
    for side, state in cache.layers[1].sides.items():
        now = torch.cat([run.decode() for run in state.sealed[0]])
        assert len(now) == 36 and torch.equal(now[: len(old[side])], old[side])
        assert len(state.sealed[0]) < 8  # neighbours became one
        joined = state.sealed[0][0].terms[0].parts[1]
        assert joined.base.inner.levels is not None and joined.shape[0] >= before[side].shape[0] - 1


def test_levels_and_ranges_are_counted_once(calibrated):
    model, method, tables = calibrated
    cache = caches.open(model, method, tables=tables)
    feed(model, cache, WINDOWS[:, :20])
    bits = cache.memory()["bits"]
    assert bits["keys.levels"] == bits["values.levels"] == 2 * 8 * 16 and bits["keys.centers"] == 2 * CHANNELS * 16
    assert bits["keys.codes"] == 2 * 3 * 19 * CHANNELS * 3  # two layers, three sequences, all tokens but the first
    assert bits["values.values"] == 2 * 3 * (CHANNELS + 19 * 2) * 16


def test_keys_lose_least_by_channel_and_before_their_rotation():
    """On a model whose keys have channels far from zero, as large ones do: rotation turns their offset into a wide range."""
    model = small()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias = torch.nn.Parameter(torch.zeros(CHANNELS))
            layer.self_attn.k_proj.bias[[1, 3, 10]] = torch.tensor([8.0, -12.0, 10.0])
    lost = []
    for fields in ({"key_axis": "token", "before_rotation": False}, {"before_rotation": False}, {}):
        method = Kvquant(bits=3, outliers=0.0, levels="uniform", **fields)
        recorded = next(record_states(model, WINDOWS, rotated=method.rotated_keys))[1]
        run = CacheRun(0, 1, True, 2, tables=method.fit(recorded))
        # rotation keeps lengths, so errors before and after it are the same
        lost.append(sum(float((method.seal_keys(keys[1:], run).decode() - keys[1:]).square().sum()) for keys in recorded.keys))
    assert lost[1] < 0.8 * lost[0] and lost[2] < 0.8 * lost[1]


@pytest.mark.slow
def test_on_the_built_in_model_rotation_levels_and_outliers_each_help():
    model = fewbits.load("builtin:tiny-lm")
    tokenizer = open_model("builtin:tiny-lm").tokenizer()
    text = fewbits.TextSample(count=4, length=160).windows(tokenizer)
    windows = fewbits.TextSample("builtin:heldout", 8, 128).windows(tokenizer)
    recorded = {rotated: dict(record_states(model, text, rotated=rotated, gradients=True)) for rotated in (True, False)}
    with torch.no_grad():
        dense = model(input_ids=windows).logits[:, 88:].log_softmax(-1)

    @torch.no_grad()
    def kl(**fields):
        """Of the tokens behind a sealed prompt of 88."""
        method = Kvquant(bits=2, **fields)
        tables = {layer: method.fit(states) for layer, states in recorded[method.rotated_keys].items()}
        given = {cache_keyword(model): caches.open(model, method, tables=tables, chunked=True)}
        model(input_ids=windows[:, :88], **given)
        found = model(input_ids=windows[:, 88:], **given).logits.log_softmax(-1)
        return float((dense.exp() * (dense - found)).sum(-1).mean())

    plain = {"outliers": 0.0, "levels": "uniform"}
    ladder = [kl(**plain, before_rotation=False), kl(**plain), kl(outliers=0.0), kl()]
    assert all(better < 0.95 * worse for worse, better in pairwise(ladder))


@pytest.mark.parametrize(
    ("fields", "text"), [({"bits": 0}, "bits=0"), ({"outliers": 0.6}, "outliers=0.6"), ({"sink": -1}, "sink=-1"), ({"iterations": 0}, "=0")]
)
def test_wrong_fields(fields, text):
    with pytest.raises(InputError, match=text):
        Kvquant(**fields)


def test_tables_of_other_sizes_are_refused():
    method = Kvquant(bits=3)
    with pytest.raises(InputError, match=r"layer 0: the tables hold 7 keys\.edges, not 15"):
        Kvquant(bits=4).seal_keys(states().keys[0], run_of(method))
    with pytest.raises(InputError, match=r"hold no keys\.centers"):
        method.seal_keys(states().keys[0], CacheRun(0, 3, True, 2))
    with pytest.raises(InputError, match=r"too short; \[count, 3 tokens or more\] would be right"):
        method.calibrate(small(), WINDOWS[:, :2])
