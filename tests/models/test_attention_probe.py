from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.core.cache_method import CacheMethod
from fewbits.core.errors import InputError
from fewbits.core.method import Paper
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.dense import Dense
from fewbits.models.attention_probe import column_scores, probe_rows, watch_attention
from fewbits.models.hf_cache import CompressedCache, cache_keyword


@dataclass(frozen=True)
class Noted(CacheMethod):
    """Keeps everything, and the salience that it was told."""

    paper: ClassVar[Paper] = Paper("none")
    uses_salience: ClassVar[bool] = True
    probe_share: float = 1.0
    every: int = 4

    def __post_init__(self):
        object.__setattr__(self, "told", [])

    def due(self, waiting, side, prompt):
        return waiting // self.every * self.every

    def seal_keys(self, keys, run):
        self.told.append((run.layer, run.start, run.salience))
        return CompressedTensor((Dense(keys),))

    def seal_values(self, values, run):
        return CompressedTensor((Dense(values),))


def small(kind="sdpa"):
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, attn_implementation=kind, initializer_range=0.3)).eval()


TOKENS = torch.randint(1, 61, (2, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(TOKENS)
MASK[0, :3] = 0


@torch.no_grad()
def test_salience_is_the_mean_attention_of_those_who_see_a_token():
    model, method = small(), Noted()
    expected = small("eager")(input_ids=TOKENS, attention_mask=MASK, output_attentions=True).attentions
    plain = model(input_ids=TOKENS, attention_mask=MASK).logits
    cache = CompressedCache(model, method)
    given = {cache_keyword(model): cache}
    found = model(input_ids=TOKENS, attention_mask=MASK, **given).logits
    torch.testing.assert_close(found[MASK.bool()], plain[MASK.bool()], rtol=1e-4, atol=1e-4)
    cache.flush()
    assert [one[:2] for one in method.told] == [(0, 0), (0, 0), (1, 0), (1, 0)]
    for number, (layer, _, salience) in enumerate(method.told):
        row = number % 2
        attention = expected[layer][row].unflatten(0, (2, 2)).sum(1) * MASK[row][:, None]  # [key heads, rows, tokens]
        seers = torch.tensor([int(MASK[row, place:].sum()) for place in range(12)])
        mean = attention.sum(1) / seers
        text = MASK[row].bool()
        torch.testing.assert_close(salience[:, text], mean[:, text], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_later_queries_add_to_what_waits():
    model, method = small(), Noted(every=100)
    cache = CompressedCache(model, method)
    given = {cache_keyword(model): cache}
    mask = torch.ones_like(TOKENS)
    model(input_ids=TOKENS[:, :10], attention_mask=mask[:, :10], **given)
    first = cache.layers[1].salience
    model(input_ids=TOKENS[:, 10:11], attention_mask=mask[:, :11], **given)
    second = cache.layers[1].salience
    assert first.shape == (2, 2, 10) and second.shape == (2, 2, 11)
    attention = small("eager")(input_ids=TOKENS[:, :11], output_attentions=True).attentions[1].unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(second, attention.sum(2) / torch.arange(11, 0, -1), rtol=1e-4, atol=1e-5)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.layers[1].salience, second[[1, 1]])


def test_probe_rows_are_the_last_and_as_many_others():
    rows = probe_rows(100, 0.1)
    assert len(rows) == 10 and rows[-5:].tolist() == [95, 96, 97, 98, 99] and len(rows.unique()) == 10 and bool((rows[:5] < 95).all())
    assert probe_rows(3, 1.0).tolist() == [0, 1, 2] and probe_rows(1, 0.1).tolist() == [0]


def test_scores_by_hand():
    query, key = torch.zeros(1, 2, 2, 4), torch.zeros(1, 1, 2, 4)
    sums, counts = column_scores(query, key, None, 1.0, 1.0)
    # the first row sees the first token alone, the second row both alike; two queries share the head
    assert sums.tolist() == [[[3.0, 1.0]]] and counts.tolist() == [[2, 1]]


def test_an_attention_that_cannot_be_watched_is_named():
    with pytest.raises(InputError, match="'eager' cannot be watched"):
        watch_attention(small("eager"), [])
