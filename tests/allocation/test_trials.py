"""Trials are what they say: sizes of stored tensors, losses that an independent computation confirms, and the same after a stop."""

import pytest
import torch
from scipy.stats import spearmanr
from transformers import MixtralConfig, MixtralForCausalLM

from fewbits.allocation.problem import group_layers, spread, state_problem
from fewbits.allocation.trials import TrialSettings, try_options
from fewbits.core.errors import InputError
from fewbits.data.text import TextSample
from fewbits.methods.activations.smoothquant import Smoothquant
from fewbits.methods.weights.compactifai import Compactifai
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.rtn import Rtn
from fewbits.methods.weights.squeezellm import Squeezellm
from fewbits.models.source import open_model
from fewbits.pipeline.feed import StreamOptions
from fewbits.pipeline.gradients import gather_output_gradients

TOKENS = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(0))
OPTIONS = [Rtn(bits=2, group_size=16), Rtn(bits=4, group_size=16), Rtn(bits=8, group_size=16)]


def tried(model, work, options=OPTIONS, kind="output", **fields):
    settings = TrialSettings(kind, windows=6, **fields)
    return try_options(open_model(model), options, (TOKENS, None), work, settings)


def test_sizes_are_those_of_the_stored_tensors(learned, tmp_path):
    trials = tried(learned, tmp_path / "work")
    model = open_model(learned).load()
    assert list(trials) == [name for name, module in model.model.named_modules(prefix="model") if isinstance(module, torch.nn.Linear)]
    for name, trial in trials.items():
        weight = model.get_submodule(name).weight.detach()
        assert trial.sizes == tuple(sum(option.compress(weight, None).bits().values()) for option in OPTIONS)
        assert (trial.weights, trial.columns) == (weight.numel(), weight.shape[1])
        assert trial.losses[0] > trial.losses[1] > trial.losses[2] > 0


@torch.no_grad()
def test_kl_is_that_of_the_model_with_one_layer_replaced(learned, tmp_path):
    trials = tried(learned, tmp_path / "work", kind="kl")
    dense = torch.log_softmax(open_model(learned).load()(input_ids=TOKENS).logits, -1)
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        for option, lost in zip(OPTIONS, trials[name].losses, strict=True):
            model = open_model(learned).load()
            linear = model.get_submodule(name)
            linear.weight.copy_(option.compress(linear.weight, None).decode())
            now = torch.log_softmax(model(input_ids=TOKENS).logits, -1)
            assert lost == pytest.approx(float((dense.exp() * (dense - now)).sum(-1).mean()), rel=1e-2, abs=1e-6)


def gradients(learned, name, per_token):
    """Of single windows: the loss's gradient by a layer's weight, or by its outputs, from plain autograd."""
    found = []
    for window in TOKENS:
        model = open_model(learned).load()
        seen = []

        def remember(module, inputs, outputs, seen=seen):
            outputs.retain_grad()
            seen.append(outputs)

        model.get_submodule(name).register_forward_hook(remember)
        loss = model(input_ids=window[None], labels=window[None]).loss
        (loss * (len(window) - 1 if per_token else 1)).backward()
        found.append(seen[0].grad[0] if per_token else model.get_submodule(name).weight.grad)
    return torch.stack(found)


def test_fisher_and_hessian_are_the_quadratic_forms_that_they_say(learned, tmp_path):
    name = "model.layers.1.self_attn.k_proj"
    weight = open_model(learned).load().get_submodule(name).weight.detach()
    error = OPTIONS[0].compress(weight, None).decode() - weight
    squares = gradients(learned, name, per_token=False).square().sum(0)
    fisher = 15 / 6 * float((squares * error.square()).sum()) / 2
    assert tried(learned, tmp_path / "fisher", kind="fisher")[name].losses[0] == pytest.approx(fisher, rel=1e-3)
    moment = gradients(learned, name, per_token=True).square().mean((0, 1))
    torch.testing.assert_close(gather_output_gradients(open_model(learned), [name], TOKENS)[name], moment, rtol=1e-3, atol=1e-8)
    inputs = []
    model = open_model(learned).load()
    model.get_submodule(name).register_forward_pre_hook(lambda module, given: inputs.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=TOKENS)
    hessian = float((moment * (inputs[0] @ error.T).square().mean(0)).sum()) / 2
    assert tried(learned, tmp_path / "hessian", kind="hessian")[name].losses[0] == pytest.approx(hessian, rel=1e-3)


@pytest.mark.slow
def test_estimates_rank_layers_as_the_measured_divergence_does(first_blocks, tmp_path):
    source = open_model(first_blocks)
    text = TextSample("builtin:calibration", 8, 64).windows(source.tokenizer()), None
    options = [Rtn(bits=3, group_size=64), Rtn(bits=4, group_size=64)]
    found = {}
    for kind in ("kl", "hessian", "fisher", "output"):
        trials = try_options(source, options, text, tmp_path / kind, TrialSettings(kind, 8))
        found[kind] = [trial.losses[0] for trial in trials.values()]
    agree = {kind: float(spearmanr(found["kl"], values).statistic) for kind, values in found.items()}
    assert agree["hessian"] > 0.85 and agree["fisher"] > 0.6, agree
    assert agree["hessian"] > agree["output"], agree


def test_a_stopped_run_goes_on_and_ends_in_the_same_numbers(learned, tmp_path):
    whole = tried(learned, tmp_path / "whole", kind="kl")

    def stop(block, blocks, what, *_):
        if block == 0 and "trials" in what:
            raise KeyboardInterrupt

    settings = TrialSettings("kl", windows=6)
    with pytest.raises(KeyboardInterrupt):
        try_options(open_model(learned), OPTIONS, (TOKENS, None), tmp_path / "stopped", settings, StreamOptions(progress=stop))
    assert (tmp_path / "stopped" / "block-00000.json").exists() and not (tmp_path / "stopped" / "block-00001.json").exists()
    assert tried(learned, tmp_path / "stopped", kind="kl") == whole
    with pytest.raises(InputError, match="other settings"):
        tried(learned, tmp_path / "stopped", kind="output")


def test_layers_that_an_engine_fuses_are_one_part(learned, tmp_path):
    trials = tried(learned, tmp_path / "work")
    fused = group_layers(trials, "fused")
    assert [len(layers) for layers in fused.values()] == [3, 1, 2, 1] * 2
    assert fused["model.layers.0.self_attn.q_proj"] == tuple(f"model.layers.0.self_attn.{one}_proj" for one in "qkv")
    assert fused["model.layers.1.mlp.gate_proj"] == tuple(f"model.layers.1.mlp.{one}_proj" for one in ("gate", "up"))
    assert [len(layers) for layers in group_layers(trials, "block").values()] == [7, 7] and len(group_layers(trials, "layer")) == 14
    problem = state_problem(["2", "4", "8"], trials, fused)
    for part, layers in fused.items():
        assert problem.sizes[part] == tuple(map(sum, zip(*(trials[one].sizes for one in layers), strict=True)))
        assert problem.losses[part][0] == pytest.approx(sum(trials[one].losses[0] for one in layers))
    chosen = spread(dict.fromkeys(fused, 1) | {"model.layers.0.self_attn.q_proj": 2}, fused)
    assert [chosen[f"model.layers.0.self_attn.{one}_proj"] for one in "qkvo"] == [2, 2, 2, 1]


def test_experts_of_a_block_are_one_part(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    MixtralForCausalLM(MixtralConfig(vocab_size=64, num_local_experts=4, **sizes)).save_pretrained(tmp_path / "model")
    fused = group_layers(tried(tmp_path / "model", tmp_path / "work"), "fused")
    assert len(fused["model.layers.0.experts"]) == 8 and all(".experts." in name for name in fused["model.layers.1.experts"])
    assert fused["model.layers.1.self_attn.q_proj"] == tuple(f"model.layers.1.self_attn.{one}_proj" for one in "qkv")


def test_any_layer_method_can_be_an_option(learned, tmp_path):
    """Error feedback, levels placed by gradients, rounded activations."""
    options = [Gptq(bits=3, group_size=16), Squeezellm(bits=3), Smoothquant(bits=8)]
    for kind in ("output", "kl"):
        trials = tried(learned, tmp_path / kind, options, kind)
        assert all(0 < lost < 10 for trial in trials.values() for lost in trial.losses)


def test_what_cannot_be_tried_is_named(learned, tmp_path):
    with pytest.raises(InputError, match="compactifai trains the whole model"):
        tried(learned, tmp_path / "a", [Compactifai(), *OPTIONS])
    with pytest.raises(InputError, match="keep every layer dense"):
        tried(learned, tmp_path / "b", keep=("*",))
    with pytest.raises(InputError, match="sensitivity='taylor' is not known; kl, hessian"):
        TrialSettings("taylor")
    kept = tried(learned, tmp_path / "c", keep=("*.0.*",))
    assert len(kept) == 7 and all(".1." in name for name in kept)
