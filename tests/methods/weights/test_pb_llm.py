import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.tensor import from_stored
from fewbits.evaluation.fidelity import score
from fewbits.layers.learned import LearnedLinear
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.pb_llm import PbLlm
from fewbits.models.source import open_model
from fewbits.pipeline.train import Schedule, text_loss, train
from fewbits.solvers.binary import top_entries
from fewbits.solvers.error_feedback import factorize
from fewbits.statistics.hessian import Hessian

sys.path.insert(0, str(Path(__file__).parent))
from layer_problem import heavy_layer, output_error


def error(method, seed=0, statistics=None):
    weight, gathered, heldout = heavy_layer(seed, 256, 512)
    return output_error(weight, method.compress(weight, statistics or gathered).decode(), heldout)


def diagonal(seed=0):
    """Statistics whose error feedback moves nothing."""
    _, statistics, _ = heavy_layer(seed, 256, 512)
    statistics[Hessian].matrix.copy_(torch.diag(statistics[Hessian].matrix.diagonal()))
    return statistics


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_exactly_the_share_is_salient_and_bits_are_counted(share):
    weight, statistics, _ = heavy_layer(0, 256, 512)
    tensor = PbLlm(share=share, mask_storage="bitmap").compress(weight, statistics)
    count, entries = round(share * weight.numel()), weight.numel()
    bits = sum(tensor.bits().values())
    # Signs, salient codes, one bit of mask a weight; fp16 mu and alpha, fp16 scale and a zero point of a byte a row.
    assert bits - (entries - count + 8 * count + entries + 256 * (32 + 24)) in range(0, 16)
    assert torch.equal(from_stored(tensor.settings(), tensor.tensors()).decode(), tensor.decode())
    smaller = PbLlm(share=share).compress(weight, statistics)
    assert sum(smaller.bits().values()) <= bits and torch.equal(smaller.decode(), tensor.decode())


def test_the_binary_levels_are_the_best_for_their_signs():
    """The gradient of the squared error with respect to alpha is zero; one percent more or less is worse."""
    weight, statistics, _ = heavy_layer(0, 64, 128)
    method = PbLlm(share=0.1)
    factor = factorize(statistics[Hessian].matrix, 0.01)
    low = ~method.salient(weight, factor)
    mean = (weight * low).sum(1, keepdim=True) / low.sum(1, keepdim=True)
    signs = torch.where(weight >= mean, 1.0, -1.0)
    stored = method.compress(weight, statistics).terms[0].outside_grid
    assert torch.allclose(stored.offsets.float(), mean, rtol=1e-3, atol=1e-6)
    lost = [(((weight - mean - k * stored.scales.float() * signs) * low).square()).sum(1) for k in (1.0, 0.99, 1.01)]
    assert bool((lost[0] <= lost[1]).all()) and bool((lost[0] <= lost[2]).all())


def test_saliency_by_the_hessian_beats_magnitude_which_beats_chance():
    weight, statistics, heldout = heavy_layer(0, 256, 512)
    factor, plain = (factorize(gathered[Hessian].matrix, 0.01) for gathered in (statistics, diagonal()))
    random = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))
    masks = {
        "hessian": PbLlm().salient(weight, factor),
        "magnitude": PbLlm(saliency="magnitude").salient(weight, factor),
        "random": top_entries(random, 0.1),
    }
    lost = {}
    for way, used in (("feedback", factor), ("without", plain)):
        for name, mask in masks.items():
            lost[name, way] = output_error(weight, PbLlm().solve(weight, used, mask).decode(), heldout)
            print(f"{name}, {way}: {lost[name, way]:.3f}")
    assert lost["hessian", "feedback"] < lost["magnitude", "feedback"] < 0.5 * lost["random", "feedback"]
    assert lost["magnitude", "without"] < 0.5 * lost["random", "without"]
    assert all(lost[name, "feedback"] < 0.9 * lost[name, "without"] for name in masks)
    assert lost["hessian", "feedback"] == error(PbLlm())


def test_more_salient_weights_lose_less():
    lost = [error(PbLlm(share=share)) for share in (0.0, 0.05, 0.1, 0.2, 0.3)]
    assert lost == sorted(lost, reverse=True) and lost[0] > 3 * lost[2]


def test_ten_percent_beat_gptq_at_two_bits_and_cost_what_they_cost():
    weight, statistics, _ = heavy_layer(0, 256, 512)
    ours = PbLlm().compress(weight, statistics)
    assert error(PbLlm()) < error(Gptq(bits=2, group_size=None))
    assert 2.1 < ours.bits_per_weight() < 2.9  # 1.7 is what is left when nobody counts where the salient ones are


def test_salient_weights_are_half_a_step_from_what_feedback_made_of_them():
    """W - Q = E U with the scaled errors E: a column's rounding error, after compensation, is its own part of that sum."""
    weight, statistics, _ = heavy_layer(0, 256, 512)
    factor = factorize(statistics[Hessian].matrix, 0.01)
    salient = PbLlm().salient(weight, factor)
    term = PbLlm().compress(weight, statistics).terms[0]
    scaled = torch.linalg.solve_triangular(factor.upper, (weight - term.decode()).double(), upper=True, left=False)
    rounding = (scaled * factor.upper.diagonal()).abs()[salient]
    codes = term.inside.decode().flatten()
    kept = (codes > 0) & (codes < 255)  # a compensated weight may leave its row's original range, and is cut off at its ends
    half = (term.inside_grid.scales.double() / 2).expand(-1, 512)[salient]
    print(f"{float(1 - kept.double().mean()):.4f} of the salient weights at the ends of their grid")
    assert bool((rounding <= 1.001 * half)[kept].all()) and float(kept.double().mean()) > 0.95
    low = (scaled * factor.upper.diagonal()).abs()[~salient]
    assert float(low.mean()) > 20 * float(rounding[kept].mean())


def test_the_mask_is_that_of_the_original_weight():
    weight, statistics, _ = heavy_layer(0, 64, 128)
    mask = PbLlm().salient(weight, factorize(statistics[Hessian].matrix, 0.01))
    assert torch.equal(PbLlm().compress(weight, statistics).terms[0].positions.mask(), mask)
    upper = factorize(statistics[Hessian].matrix, 0.01).upper.diagonal()
    scores = weight.double() ** 2 / upper**2
    assert float(scores[mask].min()) >= float(scores[~mask].max()) * (1 - 1e-5)


def test_groups_choose_and_fit_for_themselves():
    weight, statistics, _ = heavy_layer(0, 64, 128)
    term = PbLlm(group_size=48).compress(weight, statistics).terms[0]
    counts = [int(part.sum()) for part in term.positions.mask().split(48, dim=1)]
    assert sum(counts) == round(0.1 * 64 * 128) and all(
        abs(count - 0.1 * 64 * size) <= 1 for count, size in zip(counts, (48, 48, 32), strict=True)
    )
    assert term.outside_grid.scales.shape == (64, 3) and term.inside_grid.scales.shape == (64, 1)


def test_dead_inputs_are_never_salient_and_do_not_move_the_levels():
    weight, statistics, _ = heavy_layer(0, 64, 128)
    hessian = statistics[Hessian].matrix
    hessian[:, 5] = hessian[5] = 0
    weight[:, 5] = 10.0
    term = PbLlm().compress(weight, statistics).terms[0]
    other = weight.clone()
    other[:, 5] = 3.0
    assert not term.positions.mask()[:, 5].any() and int(term.positions.mask().sum()) == round(0.1 * 64 * 128)
    assert torch.equal(term.outside_grid.scales, PbLlm().compress(other, statistics).terms[0].outside_grid.scales)
    assert bool((term.decode()[:, 5] > 0).all())  # its own sign


def test_without_salient_weights_nothing_is_said_of_them():
    weight, statistics, _ = heavy_layer(0, 64, 128)
    tensor = PbLlm(share=0.0).compress(weight, statistics)
    assert tensor.bits() == {"terms.0.signs": 64 * 128, "terms.0.scales": 64 * 16, "terms.0.offsets": 64 * 16}
    decoded = tensor.decode()
    assert all(len(row.unique()) == 2 for row in decoded)


def test_the_official_fit_is_further_from_the_binarized_weights():
    weight, statistics, _ = heavy_layer(0, 256, 512)
    low = ~PbLlm(share=0.3).salient(weight, factorize(statistics[Hessian].matrix, 0.01))
    lost = []
    for fit in ("mean", "official"):
        decoded = PbLlm(share=0.3, fit=fit).compress(weight, diagonal()).decode()
        lost.append(float(((decoded - weight) * low).square().sum()))
    assert lost[0] < lost[1]


def test_values_out_of_range_are_named():
    for values, says in [({"share": 0.95}, "share=0.95"), ({"fit": "best"}, "fit='best'"), ({"qat_steps": -1}, "qat_steps=-1")]:
        with pytest.raises(InputError, match=says):
            PbLlm(**values)
    weight, statistics, _ = heavy_layer(0, 8, 32)
    with pytest.raises(InputError, match=r"trains a whole model on text, with PbLlm\.learn"):
        PbLlm(qat_steps=5).compress(weight, statistics)
    with pytest.raises(InputError, match="trains nothing"):
        PbLlm().learn(torch.nn.Linear(2, 2), torch.zeros(1, 2, dtype=torch.long))


def small_llama(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval()


def chain(count, seed):
    """Token windows of a random Markov chain: a language that a small model can learn."""
    odds = torch.softmax(3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1)), -1)
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(64, (count,), generator=generator)]
    for _ in range(31):
        tokens.append(torch.multinomial(odds[tokens[-1]], 1, generator=generator)[:, 0])
    return torch.stack(tokens, 1)


def stand_ins(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LearnedLinear)}


def test_training_ends_in_what_is_stored_and_touches_signs_alone():
    method, windows = PbLlm(qat_steps=5, qat_rate=1e-2), chain(64, 5)
    dense = small_llama()
    model = method.prepare(small_llama())
    inside = stand_ins(model)
    assert len(inside) == 14 and not isinstance(model.lm_head, LearnedLinear)
    assert {name for name, one in model.named_parameters() if one.requires_grad} == {f"{name}.latent" for name in inside}
    first = {name: module.weight().detach() for name, module in inside.items()}
    groups = [group for module in inside.values() for group in module.groups()]
    train(groups, text_loss(model, windows, method.loss), method.qat_steps)
    outputs = {}
    for name, module in inside.items():
        module.harden()
        outputs[name] = module.weight().detach()
        assert module.latent.dtype == torch.float32
    finished = method.finish(model)
    for name, module in inside.items():
        weight, salient = dense.get_submodule(name).weight, module.salient
        made = finished.get_submodule(name).stored.weight
        assert torch.equal(made.decode(), outputs[name]) and int(salient.sum()) == round(0.1 * salient.numel())
        assert torch.equal(outputs[name][salient], first[name][salient]) and len(outputs[name][~salient].unique()) == 2
        step = (weight.amax(1) - weight.amin(1)) / 255
        assert bool(((outputs[name] - weight).abs() <= 0.51 * step[:, None] + 1e-4)[salient].all())
        assert not torch.equal(outputs[name].sign(), first[name].sign())
    for name in ("model.embed_tokens", "lm_head", "model.norm", "model.layers.0.input_layernorm"):
        assert torch.equal(finished.get_submodule(name).weight, dense.get_submodule(name).weight)


def test_the_gradient_passes_straight_through_the_signs_and_stops_at_salient_weights():
    module = next(iter(stand_ins(PbLlm(qat_steps=1).prepare(small_llama())).values()))
    factors = torch.randn(module.latent.shape)
    (module.weight() * factors).sum().backward()
    expected = torch.where(module.salient, 0.0, module.scale.float() * factors)
    torch.testing.assert_close(module.latent.grad, expected)


def test_the_scale_follows_in_training_and_rests_in_evaluation():
    module = next(iter(stand_ins(PbLlm(qat_steps=1, qat_scales="row").prepare(small_llama())).values()))
    held = module.scale.clone()
    with torch.no_grad():
        module.latent.mul_(2)
    module.eval()
    module.weight()
    assert torch.equal(module.scale, held) and held.shape == (64, 1)
    module.train()
    module.weight()
    torch.testing.assert_close(module.scale.float(), 2 * held.float(), rtol=1e-3, atol=0)
    assert not module.scale.requires_grad


def test_training_takes_other_masks_and_ends_the_same_way_each_time():
    windows, method = chain(64, 5), PbLlm(qat_steps=3, qat_rate=1e-2)
    name = "model.layers.0.mlp.up_proj"
    mask = torch.zeros(128, 64, dtype=torch.bool)
    mask[:, 7] = True
    models = [method.learn(small_llama(), windows, salient={name: mask}) for _ in range(2)]
    stored = [model.get_submodule(name).stored.weight for model in models]
    assert torch.equal(stored[0].terms[0].positions.mask(), mask) and torch.equal(stored[0].decode(), stored[1].decode())
    with pytest.raises(InputError, match=r"up_proj: a mask \[64, 128\] does not fit"):
        method.prepare(small_llama(), salient={name: mask.T})


def test_a_frozen_scale_is_worse_where_the_weights_go_far():
    """Trained from noise; the scale of a trained network moves by less than a hundredth, and then it hardly matters."""
    windows, heldout = chain(2048, 100), chain(64, 101)
    method, lost = PbLlm(qat_steps=120, qat_rate=1e-3), {}
    for frozen in (False, True):
        model = method.prepare(small_llama())
        model.train(not frozen)  # scales are made anew in training mode alone, and nothing else depends on it here
        groups = [group for module in stand_ins(model).values() for group in module.groups()]
        train(groups, text_loss(model, windows, method.loss, batch_size=16), method.qat_steps, schedule=Schedule(warmup=0.05))
        with torch.no_grad():
            lost[frozen] = float(method.loss(model.eval()(input_ids=heldout), heldout, 0))
    print(f"held-out loss {lost[False]:.3f}, with frozen scales {lost[True]:.3f}, of noise {torch.tensor(64.0).log():.3f}")
    assert lost[False] < lost[True] - 0.05 < torch.tensor(64.0).log()


@pytest.mark.slow
def test_training_repairs_a_binarized_model_and_salient_weights_help():
    source = open_model("builtin:tiny-lm")
    windows = fewbits.TextSample(count=48, length=64).windows(source.tokenizer())
    heldout = fewbits.TextSample("builtin:heldout", 8, 64).windows(source.tokenizer())
    lost = {"dense": float(score(source.load(), heldout).loss.mean())}
    for share in (0.1, 0.0):
        for name, values in {"start": {"qat_steps": 1, "qat_rate": 1e-9}, "trained": {"qat_steps": 40, "qat_rate": 1e-3}}.items():
            method = PbLlm(share=share, accumulate=1, **values)
            lost[name, share] = float(score(method.learn(source.load(), windows), heldout).loss.mean())
    print({name: round(value, 3) for name, value in lost.items()})
    assert lost["start", 0.0] > lost["dense"] + 2 and lost["start", 0.1] > lost["dense"] + 0.3
    assert lost["trained", 0.0] < lost["start", 0.0] - 1 and lost["dense"] < lost["trained", 0.1] < lost["start", 0.1] - 0.1
    assert lost["trained", 0.0] > lost["trained", 0.1] + 0.3
