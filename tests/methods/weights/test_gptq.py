import dataclasses
import logging

import pytest
import torch

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.methods.weights import gptq
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.adapter import Adapter
from fewbits.models.source import open_model
from fewbits.statistics.hessian import Hessian

VARIANTS = [
    {"group_size": None},
    {"group_size": 32},
    {"group_size": 24},
    {"group_size": 32, "static_groups": True},
    {"group_size": 32, "activation_order": True},
    {"group_size": 32, "activation_order": True, "static_groups": True},
    {"group_size": 32, "symmetric": True},
]


def layer(rows=64, columns=128, seed=0):
    """Heavy-tailed weights and correlated inputs with a few strong channels, as in a language model; held-out inputs apart."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    mixing[:, :6] *= 8
    inputs = torch.randn(2048, columns, generator=generator) @ mixing
    weight = torch.randn(rows, columns, generator=generator) / torch.randn(rows, columns, generator=generator).abs().clamp(min=0.3)
    hessian = Hessian(columns)
    hessian.update(inputs[:1024])
    return weight, Statistics(hessian, tokens=1024), inputs[1024:]


def output_error(weight, tensor, inputs):
    return float(((inputs @ (weight - tensor.decode()).T) ** 2).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_output_error_falls_while_weight_error_rises(bits, variant):
    weight, statistics, heldout = layer()
    ours = Gptq(bits=bits, **variant).compress(weight, statistics)
    plain = Rtn(bits=bits, group_size=variant["group_size"], symmetric=variant.get("symmetric", False)).compress(weight, statistics)
    assert sum(ours.terms[0].bits().values()) == sum(plain.bits().values())
    stores_order = variant.get("activation_order", False) and not variant.get("static_groups", False)
    assert sum(ours.bits().values()) == sum(plain.bits().values()) + stores_order * 128 * 16
    assert output_error(weight, ours, heldout) < 0.75 * output_error(weight, plain, heldout)
    assert ((weight - ours.decode()) ** 2).sum() > ((weight - plain.decode()) ** 2).sum()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("block_size", [1, 32, 128])
def test_the_squared_errors_add_up_to_the_output_error(variant, block_size, monkeypatch):
    """In float64, with the damped Hessian, and against the original weight whatever the grids and the order were."""
    weight, statistics, _ = layer(rows=16, columns=160)
    engine, errors = gptq.error_feedback, []

    def watched(*given, **named):
        result = engine(*given, **named)
        errors.append(result[1])
        return result

    monkeypatch.setattr(gptq, "error_feedback", watched)
    method = Gptq(bits=3, block_size=block_size, **variant)
    difference = weight.double() - method.compress(weight.double(), statistics).decode().double()
    hessian = statistics[Hessian].matrix.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(160)
    trace = float(torch.trace(difference @ hessian @ difference.T))
    assert errors[0].dtype == torch.float64 and abs(float(errors[0].square().sum()) - trace) / trace < 1e-8


def student_probe(seed=1):
    """256 x 512 weights of Student's t with 5 degrees of freedom, correlated inputs, six strong channels; held-out inputs."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(5, 256, 512, generator=generator).square().mean(0).sqrt()
    weight = torch.randn(256, 512, generator=generator) / spread
    mixing = torch.randn(128, 512, generator=generator) / 128**0.5
    inputs = torch.randn(6144, 128, generator=generator) @ mixing + 0.3 * torch.randn(6144, 512, generator=generator)
    inputs[:, torch.randperm(512, generator=generator)[:6]] *= 10
    hessian = Hessian(512)
    hessian.update(inputs[:4096])
    return weight, Statistics(hessian, tokens=4096), inputs[4096:]


@pytest.mark.parametrize(("bits", "at_most", "in_order"), [(2, 0.4, 0.27), (3, 0.33, 0.22), (4, 0.32, 0.22)])
def test_the_probe_of_strong_channels_loses_a_third(bits, at_most, in_order):
    weight, statistics, heldout = student_probe()
    plain = output_error(weight, Rtn(bits=bits, group_size=None).compress(weight, statistics), heldout)
    ours, ordered = (
        output_error(weight, Gptq(bits=bits, group_size=None, activation_order=order).compress(weight, statistics), heldout) / plain
        for order in (False, True)
    )
    assert ours < at_most and ordered < in_order


@pytest.mark.slow
def test_nearly_every_linear_of_a_real_model_gains():
    """Squared error of the outputs on held-out text, the linears of all blocks one by one, inputs of the dense model."""
    model, tokenizer = fewbits.load("builtin:tiny-lm"), open_model("builtin:tiny-lm").tokenizer()
    adapter = Adapter(model)
    linears = {name: linear for block in adapter.blocks for name, linear in adapter.linears(block).items()}
    moments = []
    for text in (fewbits.TextSample(count=24, length=256), fewbits.TextSample("builtin:heldout", 12, 256)):
        hessians = {name: Hessian(linear.in_features) for name, linear in linears.items()}
        hooks = [linears[n].register_forward_pre_hook(lambda _, x, n=n: hessians[n].update(x[0].flatten(0, 1))) for n in linears]  # noqa: B023
        with torch.no_grad():
            for batch in text.windows(tokenizer).split(8):
                model.model(batch)
        for hook in hooks:
            hook.remove()
        moments.append(hessians)
    for bits in (2, 3, 4):
        ratios = []
        for name, linear in linears.items():
            weight, moment = linear.weight.detach(), moments[1][name].matrix
            lost = []
            for method in (Gptq(bits=bits, group_size=64), Rtn(bits=bits, group_size=64)):
                difference = weight - method.compress(weight, Statistics(moments[0][name])).decode()
                lost.append(float(((difference @ moment) * difference).sum()))
            ratios.append(lost[0] / lost[1])
        assert len(ratios) == 56 and sum(ratio < 1 for ratio in ratios) >= 55
        assert sorted(ratios)[28] < 0.75, bits


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("block_size", [1, 32, 128])
def test_lazy_blocks_change_nothing(variant, block_size):
    weight, statistics, _ = layer(rows=16, columns=160)
    method = Gptq(bits=3, block_size=10**6, **variant)
    whole = method.compress(weight.double(), statistics).decode()
    assert torch.equal(dataclasses.replace(method, block_size=block_size).compress(weight.double(), statistics).decode(), whole)


@pytest.mark.parametrize("group_size", [None, 32])
def test_uncorrelated_inputs_give_round_to_nearest_bit_for_bit(group_size):
    weight, statistics, _ = layer()
    statistics[Hessian].matrix.copy_(torch.diag(statistics[Hessian].matrix.diagonal()))
    ours = Gptq(bits=3, group_size=group_size).compress(weight, statistics)
    assert torch.equal(ours.decode(), Rtn(bits=3, group_size=group_size).compress(weight, statistics).decode())


def test_activation_order_with_equal_diagonals_changes_nothing():
    weight, statistics, _ = layer()
    total = statistics[Hessian].matrix
    scale = total.diagonal().rsqrt()
    total.copy_(total * scale[:, None] * scale[None, :]).fill_diagonal_(1.0)
    for static in (False, True):
        plain = Gptq(bits=3, group_size=32, static_groups=static).compress(weight, statistics)
        ordered = Gptq(bits=3, group_size=32, static_groups=static, activation_order=True).compress(weight, statistics)
        assert torch.equal(plain.decode(), ordered.decode())


def test_the_hessian_of_unrelated_inputs_hurts():
    weight, statistics, heldout = layer()
    unrelated = Hessian(128)
    unrelated.update(torch.randn(1024, 128, generator=torch.Generator().manual_seed(5)))
    good, bad = (Gptq(bits=3).compress(weight, s) for s in (statistics, Statistics(unrelated)))
    assert output_error(weight, good, heldout) < 0.8 * output_error(weight, bad, heldout)


def test_fewer_tokens_than_columns_still_work():
    weight, _, heldout = layer()
    hessian = Hessian(128)
    hessian.update(heldout[:20])
    assert torch.isfinite(Gptq(bits=4).compress(weight, Statistics(hessian)).decode()).all()


def test_dead_inputs_are_rounded_to_zero_and_stay_quiet(caplog):
    weight, statistics, _ = layer()
    statistics[Hessian].matrix[7], statistics[Hessian].matrix[:, 7] = 0, 0
    with caplog.at_level(logging.WARNING):
        assert bool((Gptq(bits=4).compress(weight, statistics).decode()[:, 7] == 0).all())
    assert not caplog.text


@pytest.mark.parametrize("fields", [{"bits": 0}, {"bits": 9}, {"group_size": 0}, {"damping": 0.0}])
def test_values_out_of_range_are_refused_with_what_would_be_right(fields):
    with pytest.raises(InputError, match=f"{next(iter(fields))}=.*would be right"):
        Gptq(**fields)
