import math
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.layers.linear import CompressedLinear
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stack import first_terms, ranked
from fewbits.pipeline.store import Store
from fewbits.pipeline.stream import StreamOptions

sys.path.insert(0, str(Path(__file__).parent))
from stacked_llama import METHOD, WINDOWS, save_llama, stacked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model") / "llama")


def perplexity(folder, summary, counts, windows, mask=None):
    """By the whole model with compressed layers in it."""
    model = open_model(folder).load()
    for name, stored in summary.layers():
        model.set_submodule(name, CompressedLinear(first_terms(stored, counts.get(name, len(stored.weight.terms)))))
    for name, value in summary.replaced().items():
        model.get_parameter(name).data.copy_(value)
    with torch.no_grad():
        logits = model(windows, attention_mask=None if mask is None else mask.long()).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    kept = torch.ones_like(losses).bool() if mask is None else mask[:, 1:].flatten()
    return math.exp(float(losses[kept].mean()))


def test_each_layer_comes_once_a_level_by_the_perplexity_that_its_next_term_gives(folder, tmp_path):
    summary = stacked(folder, tmp_path / "work")
    names = [name for name, _ in summary.layers()]
    assert len(names) == 14 and len(summary.order) == 28
    for level in (1, 2):
        order = summary.order[(level - 1) * 14 : level * 14]
        assert Counter(order) == Counter(names)
        found = [perplexity(folder, summary, dict.fromkeys(names, level) | {name: level + 1}, WINDOWS[:5]) for name in order]
        assert all(first <= second * (1 + 1e-5) for first, second in pairwise(found))
        assert found[-1] > 1.001 * found[0]
        kept = Store(tmp_path / "work", summary.store.settings).state("stack")[str(level)]
        assert sorted(kept.tolist()) == pytest.approx(found, rel=1e-4)


def test_padding_is_neither_read_nor_predicted(folder, tmp_path):
    mask = torch.arange(16) < torch.tensor([16, 9, 12, 5, 16, 3])[:, None]
    summary = stacked(folder, tmp_path / "work", replace(METHOD, blocks=2), mask=mask)
    names = [name for name, _ in summary.layers()]
    kept = summary.store.state("stack")["1"]
    found = {name: perplexity(folder, summary, dict.fromkeys(names, 1) | {name: 2}, WINDOWS[:5], mask[:5]) for name in names}
    assert sorted(kept.tolist()) == pytest.approx(sorted(found.values()), rel=1e-4)


def test_a_run_that_stops_while_it_ranks_goes_on_and_ends_in_the_same_order(folder, tmp_path):
    whole = stacked(folder, tmp_path / "whole")
    seen = []

    def stop(block, blocks, what, score, left):
        if what.startswith("order 2/2") and block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stacked(folder, tmp_path / "stopped", options=StreamOptions(progress=stop))
    again = stacked(folder, tmp_path / "stopped", options=StreamOptions(progress=lambda *one: seen.append(one[2])))
    assert again.order == whole.order and len(seen) == 14 and all(what.startswith("order 2/2") for what in seen)
    assert (tmp_path / "whole/state-stack.safetensors").read_bytes() == (tmp_path / "stopped/state-stack.safetensors").read_bytes()


def test_random_order_is_drawn_within_each_level(folder, tmp_path):
    orders = [stacked(folder, tmp_path / str(seed), replace(METHOD, order="random", seed=seed)).order for seed in (0, 1)]
    assert orders[0] != orders[1] and orders[0][:14] != orders[0][14:]
    for order in orders:
        assert set(Counter(order[:14]).values()) == set(Counter(order[14:]).values()) == {1}


def test_layers_of_other_methods_and_dense_ones_stay_out_of_it(folder, tmp_path):
    plan = Plan(METHOD, keep=("*.0.mlp.up_proj",), overrides=(("*.1.self_attn.*", Rtn(bits=8, group_size=16)),))
    summary = stacked(folder, tmp_path / "work", plan=plan)
    assert len(summary.order) == 2 * (14 - 5) and not any("1.self_attn" in name or "0.mlp.up" in name for name in summary.order)
    names = set(summary.order)
    found = [perplexity(folder, summary, dict.fromkeys(names, 1) | {name: 2}, WINDOWS[:5]) for name in summary.order[:9]]
    assert found == pytest.approx(summary.store.state("stack")["1"].sort().values.tolist(), rel=1e-4)


def test_shorter_stacks_leave_the_upper_levels(folder, tmp_path):
    plan = Plan(METHOD, overrides=(("*.down_proj", replace(METHOD, blocks=2)),))
    order = stacked(folder, tmp_path / "work", plan=plan).order
    assert len(order) == 14 + 12 and not any("down_proj" in name for name in order[14:])
    mixed = Plan(METHOD, overrides=(("*.down_proj", replace(METHOD, order="random")),))
    with pytest.raises(InputError, match="rank their terms in 2 ways"):
        stacked(folder, tmp_path / "mixed", plan=mixed)


def test_scores_that_are_no_numbers_come_last_by_what_the_next_level_says():
    levels = [{"a": math.nan, "b": 7.0, "c": math.inf, "d": 5.0}, {"a": 3.0, "b": 4.0, "c": 2.0, "d": math.nan}]
    assert ranked(levels) == ("d", "b", "c", "a", "c", "a", "b", "d")  # c: 2 + 7, a: 3 + 7; d on the last level: 0 + 4
    assert ranked([{"a": 2.0, "b": 1.0}]) == ("b", "a")
    assert ranked([]) == ()


def test_an_encoder_has_no_perplexity_to_rank_by(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="has no perplexity to rank terms by; order='random'"):
        stacked(tmp_path / "bert", tmp_path / "work")
    assert not (tmp_path / "work").exists()
    assert len(stacked(tmp_path / "bert", tmp_path / "work", replace(METHOD, order="random")).order) == 2 * 12
