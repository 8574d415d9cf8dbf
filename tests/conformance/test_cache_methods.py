"""What every method that writes caches must do, whatever its idea: run on a small random language model with grouped queries.

The model computes in float64, so that what is the same to rounding is the same number once it is float32, and the same codes.
"""

import hashlib
from copy import deepcopy
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from fewbits import caches
from fewbits.core.errors import InputError, NumericsError
from fewbits.core.registry import get_method, list_methods
from fewbits.models.hf_cache import CompressedLayer, cache_keyword

NAMES = list_methods("kvcache")
SMALL = {name: 8 for name in ("group_size", "residual", "buffer", "gap", "window")} | {"steps": 0, "iterations": 5}
# All queries are probes: otherwise pieces of a prompt have other ones than the whole of it.
SMALL["probe_share"] = 1.0


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, initializer_range=0.15, pad_token_id=0)).double().eval()


@pytest.fixture(scope="module")
def opened(model):
    """Opens a cache by its method's name; what is calibrated is calibrated once."""
    methods = {}
    for name in NAMES:
        own = {field.name for field in fields(get_method(name))}
        method = replace(get_method(name)(), **{field: value for field, value in SMALL.items() if field in own})
        methods[name] = method, caches.calibrate(model, method, text=text(4, 48, seed=9)) if method.calibrated else None

    def open_one(name, **options):
        method, tables = methods[name]
        return caches.open(options.pop("model", model), method, tables=tables, **options)

    return open_one


def text(batch, length, seed=0):
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model, cache, tokens, sizes):
    """Logits of the tokens, which come in pieces."""
    assert sum(sizes) == tokens.shape[1]
    return torch.cat([model(input_ids=piece, **{cache_keyword(model): cache}).logits for piece in tokens.split(sizes, dim=1)], 1)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_told_the_length_that_is_returned(name, model, opened, monkeypatch):
    cache, lengths, update = opened(name), [], CompressedLayer.update

    def watched(layer, keys, values, *rest, **options):
        announced = layer.get_mask_sizes(keys.shape[2])
        found = update(layer, keys, values, *rest, **options)
        lengths.append((announced, found[0].shape[2], found[1].shape[2]))
        return found

    monkeypatch.setattr(CompressedLayer, "update", watched)
    seen = 0
    for piece in text(2, 70).split([31, 9, *[1] * 20, 7, 1, 1, 1], dim=1):
        assert cache.get_mask_sizes(piece.shape[1], 1) == (seen + piece.shape[1], 0)
        read(model, cache, piece, [piece.shape[1]])
        seen += piece.shape[1]
        assert cache.get_seq_length() == seen
        assert lengths[-2:] == [((seen, 0), seen, seen)] * 2


def chains(cache):
    """The sealed runs of every layer, side and sequence."""
    return [chain for layer in cache.compressed() for state in layer.sides.values() for chain in state.sealed]


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest() if tensor.numel() else ""


def holds(whole: Tensor, part: Tensor) -> bool:
    """Whether `part` is a stretch of `whole` along one of its axes, byte for byte."""
    if whole.dtype != part.dtype or whole.ndim != part.ndim:
        return False
    for axis in range(whole.ndim):
        size, rest = part.shape[axis], whole.shape[axis] - part.shape[axis]
        others = all(whole.shape[other] == part.shape[other] for other in range(whole.ndim) if other != axis)
        if rest >= 0 and others and any(torch.equal(whole.narrow(axis, start, size), part) for start in range(rest + 1)):
            return True
    return False


class Written:
    """What lay sealed at one moment: copies of the bytes, by chain."""

    def __init__(self, cache):
        self.runs = [
            [(run, run.shape[0], {name: (digest(one), one.clone()) for name, one in run.tensors().items()}) for run in chain]
            for chain in chains(cache)
        ]

    def is_kept_by(self, cache) -> bool:
        return all(self._kept(old, chain) for old, chain in zip(self.runs, chains(cache), strict=True))

    def _kept(self, old, chain) -> bool:
        """Each old run lies, in its place, in a run of today: the same one, or one that it was joined with."""
        ends = torch.tensor([run.shape[0] for run in chain]).cumsum(0)
        start = 0
        for run, count, tensors in old:
            today = chain[int((ends > start).nonzero()[0])]
            start += count
            found = today.tensors()
            if today is run:
                if any(digest(found[name]) != before for name, (before, _) in tensors.items()):
                    return False
            elif not all(any(holds(one, copy) for one in found.values()) for _, copy in tensors.values()):
                return False
        return True


@pytest.mark.parametrize("name", NAMES)
def test_what_is_sealed_is_never_written_again(name, model, opened):
    cache, tokens = opened(name), text(2, 62)
    read(model, cache, tokens[:, :20], [19, 1])
    first = before = Written(cache)
    decoded = [torch.cat([run.decode() for run in chain]) for chain in chains(cache)]
    for piece in tokens[:, 20:].split(14, dim=1):
        read(model, cache, piece, [1] * 14)
        assert before.is_kept_by(cache)
        before = Written(cache)
    assert first.is_kept_by(cache)
    for old, chain in zip(decoded, chains(cache), strict=True):
        now = torch.cat([run.decode() for run in chain])
        assert len(now) >= len(old) + 24 and torch.equal(now[: len(old)], old)
    stored = next(one for one in chains(cache)[-1][0].tensors().values() if one.numel())
    stored.flatten()[:1].view(torch.uint8)[0] ^= 1  # one bit of one number
    assert not before.is_kept_by(cache)


@torch.no_grad()
def generated(model, cache, prompt, sizes, count):
    """Greedy tokens and their logits."""
    logits = [read(model, cache, prompt, sizes)[:, -1:]]
    while len(logits) < count:
        logits.append(read(model, cache, logits[-1].argmax(-1), [1]))
    return torch.cat(logits, 1)


@pytest.mark.parametrize(("length", "count"), [(240, 14), pytest.param(2000, 4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_a_prompt_change_nothing_unless_asked_for(name, length, count, model, opened):
    prompt, pieces = text(1, length), [length * 2 // 5, length * 2 // 5, length // 5]
    whole = generated(model, opened(name), prompt, [length], count)
    in_pieces = generated(model, opened(name), prompt, pieces, count)
    assert torch.equal(whole.argmax(-1), in_pieces.argmax(-1))
    same(in_pieces, whole)
    if count > 4:
        assert (generated(model, opened(name, chunked=True), prompt, pieces, count) - whole).abs().max() > 1e-4


def tensors_in(thing, found, seen):
    """Every tensor that can be reached, by its memory; not those of modules, which are the model's, nor the calibrated tables alone."""
    if id(thing) in seen or isinstance(thing, nn.Module) or callable(thing):
        return found
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, dict):
        for key, value in thing.items():
            if key not in ("tables", "rotary", "projection"):
                tensors_in(value, found, seen)
    elif isinstance(thing, (list, tuple)):
        for one in thing:
            tensors_in(one, found, seen)
    elif hasattr(thing, "__dict__"):
        tensors_in(vars(thing), found, seen)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_that_of_all_tensors_that_are_held(name, model, opened):
    """Codes, scales, exact tokens, and what is known of the tokens: where they stand, which are padding, how they are attended to."""
    cache = opened(name)
    given = {cache_keyword(model): cache, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    placed = 0 if cache.method.rotated_keys else 32 * 2 * 109
    for padding in (11, 0):
        mask = torch.ones(2, 100, dtype=torch.long)
        mask[0, :padding] = 0
        model.generate(text(2, 100), attention_mask=mask, **given)
        memory = cache.memory()
        assert memory["bytes"] == sum(tensors_in(cache, {}, set()).values()) == sum(memory["bits"].values()) // 8
        assert memory["bits"].get("padding", 0) == (8 * 2 * 109 if padding else 0) and memory["bits"].get("positions", 0) == placed
        elements = 2 * 2 * 2 * 109 * 32  # layers, sequences, keys and values, tokens, channels
        assert memory["bits_per_element"] == pytest.approx(8 * memory["bytes"] / elements)
        assert memory["bytes"] < 8 * elements / 2  # of float64, exact tokens among them
        cache.reset()
        assert cache.memory()["bytes"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_pads_a_batch_at_the_left_changes_nothing(name, model, opened):
    tokens, mask = text(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :13] = 0
    settings = {"do_sample": False, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    settings |= {"eos_token_id": None}
    found = []
    for shown, count in ((mask, 12), (torch.ones_like(mask), 2)):
        for other in (tokens, torch.where(mask.bool(), tokens, 64 - tokens)):
            given = {cache_keyword(model): opened(name), "max_new_tokens": count}
            output = model.generate(other, attention_mask=shown, **given, **settings)
            found.append((output.sequences[:, 40:], torch.stack(output.logits)))
    assert torch.equal(found[0][0], found[1][0]) and bool(torch.isfinite(found[0][1]).all())
    same(found[0][1], found[1][1])
    assert (found[2][1] - found[3][1]).abs().max() > 1e-3  # as text it is read


@pytest.mark.parametrize("name", NAMES)
def test_sequences_are_reordered_chosen_and_repeated(name, model, opened):
    tokens, later = text(3, 40), text(3, 12, seed=1)
    cache = opened(name)
    read(model, cache, tokens, [36, *[1] * 4])
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    cache.reorder_cache(torch.tensor([1, 2, 0]))
    rows = torch.tensor([2, 0, 2])
    expected = opened(name)
    read(model, expected, tokens[rows], [36, *[1] * 4])
    found = read(model, cache, later[:, :4], [1] * 4)
    same(found, read(model, expected, later[:, :4], [1] * 4))
    unmoved = opened(name)
    read(model, unmoved, tokens, [36, *[1] * 4])
    assert (found - read(model, unmoved, later[:, :4], [1] * 4)).abs().max() > 1e-3  # the order can be told
    cache.batch_select_indices(torch.tensor([1, 2]))
    cache.batch_repeat_interleave(2)
    expected = opened(name)
    past = torch.cat([tokens[rows], later[:, :4]], 1)[[1, 1, 2, 2]]
    read(model, expected, past, [36, *[1] * 8])
    following = torch.cat([later[:, 4:], later[:1, 4:].flip(1)])
    same(read(model, cache, following, [1] * 8), read(model, expected, following, [1] * 8))


@pytest.mark.parametrize("name", NAMES)
def test_exact_tokens_are_taken_back_and_sealed_ones_are_not(name, model, opened):
    cache, tokens = opened(name), text(2, 60)

    def states():
        return [layer.read(side) for layer in cache.compressed() for side in ("keys", "values")]

    read(model, cache, tokens[:, :33], [32, 1])
    fresh = iter(tokens[:, 33:].split(1, dim=1))
    while (kept := min(state.exact.shape[2] for layer in cache.compressed() for state in layer.sides.values())) < 3:
        read(model, cache, next(fresh), [1])
    before, length = states(), cache.get_seq_length()
    with pytest.raises(InputError, match=f"the last {kept} can; the others are sealed"):
        cache.crop(-kept - 1)
    assert cache.get_seq_length() == length and all(torch.equal(one, two) for one, two in zip(before, states(), strict=True))
    cache.crop(-2)
    assert cache.get_seq_length() == length - 2
    assert all(torch.equal(one[:, :, :-2], two) for one, two in zip(before, states(), strict=True))
    read(model, cache, tokens[:, length - 2 : length], [1, 1])
    first = cache.compressed()[0]  # whose states are those of the tokens alone
    for side, whole in zip(("keys", "values"), before[:2], strict=True):
        exact = first.sides[side].exact.shape[2]
        same(first.read(side)[:, :, -min(exact, 2) :], whole[:, :, -min(exact, 2) :])


@pytest.mark.parametrize("name", NAMES)
def test_after_a_reset_it_is_as_new(name, model, opened):
    cache, tokens = opened(name), text(2, 40)
    expected = read(model, opened(name), tokens, [30, *[1] * 10])
    read(model, cache, text(3, 35, seed=5), [30, *[1] * 5])
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.memory()["bytes"] == 0 and cache.memory()["bits_per_element"] == 0
    assert torch.equal(read(model, cache, tokens, [30, *[1] * 10]), expected)


@pytest.mark.parametrize("linear", ["k_proj", "v_proj"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_a_number_is_refused(name, linear, model, opened):
    broken = deepcopy(model)
    with torch.no_grad():
        broken.model.layers[0].self_attn.get_submodule(linear).weight[3, 4] = float("nan")
    with pytest.raises(NumericsError, match=r"layer [01]: the (keys|values) of token 0 and those behind it are not finite"):
        read(broken, opened(name, model=broken), text(1, 40), [39, 1])


@pytest.mark.parametrize("name", NAMES)
def test_the_step_that_brings_tokens_reads_them_exactly(name, model, opened):
    tokens = text(2, 40)
    dense = read(model, DynamicCache(config=model.config), tokens, [40])
    found = read(model, opened(name), tokens, [38, 1, 1])
    same(found[:, :38], dense[:, :38])
    assert 1e-6 < (found[:, 38:] - dense[:, 38:]).abs().max() < 5
