from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.layers.linear import CompressedLinear
from fewbits.methods.weights.jlcm import Jlcm
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import compress_model
from fewbits.pipeline.train import BestStep, train


def problem(seed=0, rows=48, columns=96):
    """A layer, and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return weight, torch.randn(1024, columns, generator=generator) @ mixing


def learn(method, weight, inputs, steps=400):
    """Relative squared output errors at the start, at the last step and at the best; how far each index moved."""
    stand_in, target = method.begin(weight, None, Statistics()), inputs @ weight.T
    before, groups = stand_in.mapped(), [group for group in stand_in.groups() if group["params"]]

    def error():
        return (inputs @ stand_in.weight().T - target).square().sum() / target.square().sum()

    best = BestStep([one for group in groups for one in group["params"]], lambda: float(error().detach()), 10)

    def loss(step):
        best.look(step)
        return error()

    losses = train(groups, loss, steps)
    last = float(error().detach())
    best.restore()
    stored = stand_in.finish().weight
    kept = float((inputs @ (stored.decode() - weight).T).square().sum() / target.square().sum())
    assert kept == pytest.approx(best.least, rel=1e-3) and best.least <= min(last, losses[0])
    return losses[0], last, best.least, (stand_in.mapped() - before).abs()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_joint_learning_gains_a_quarter_where_codebooks_alone_gain_nothing(seed):
    weight, inputs = problem(seed)
    start, _, alone, _ = learn(Jlcm(groups=1, mapping="fixed"), weight, inputs, 200)
    _, _, joint, moved = learn(Jlcm(groups=1), weight, inputs)
    assert alone > 0.98 * start and joint < 0.75 * alone
    assert 0.02 < float((moved > 0).float().mean()) < 0.4


def test_rounding_to_the_nearest_codeword_after_learning_would_lose_what_was_gained():
    weight, inputs = problem()
    method = Jlcm(groups=1)
    stand_in, target = method.begin(weight, None, Statistics()), inputs @ weight.T
    groups = [group for group in stand_in.groups() if group["params"]]
    train(groups, lambda step: (inputs @ stand_in.weight().T - target).square().mean() * 1e3, 100)
    decoded = stand_in.finish().weight.decode()
    levels = stand_in.books().detach()[0]
    nearest = levels[(weight[..., None] - levels).abs().argmin(-1)]
    ours, rounded = (float((inputs @ (one - weight).T).square().sum()) for one in (decoded, nearest))
    assert ours < 0.85 * rounded


@pytest.mark.parametrize("rate", [0.005, 0.01])
def test_far_codewords_are_chosen_less_often_than_by_the_default(rate):
    """Plain gradient steps on nearly level logits, where all codewords have about the same share, until a fifth of all moved."""
    weight, inputs = problem()
    target, far, total = inputs @ weight.T, {}, {}
    for gradient in ("proximal", "default"):
        stand_in = Jlcm(groups=1, mapping="logits", gradient=gradient).begin(weight, None, Statistics())
        before = stand_in.mapped()
        with torch.no_grad():
            stand_in.logits.mul_(0.005)
        while float((stand_in.mapped() != before).float().mean()) < 0.2:
            stand_in.zero_grad()
            ((inputs @ stand_in.weight().T - target).square().sum() / target.square().sum()).backward()
            with torch.no_grad():
                stand_in.logits.sub_(rate * stand_in.logits.grad / stand_in.logits.grad.abs().amax())
                stand_in.logits.grad = None
        moved = (stand_in.mapped() - before).abs()
        far[gradient], total[gradient] = float((moved > 1).sum() / (moved > 0).sum()), float((moved > 0).float().mean())
    assert far["proximal"] < far["default"] and abs(total["proximal"] - total["default"]) < 0.05, (far, total)


def test_bits_are_codes_codebooks_and_the_order():
    weight = problem()[0] * torch.exp(torch.randn(48, 1, generator=torch.Generator().manual_seed(1)))
    stored = Jlcm(groups=4).begin(weight, None, Statistics()).finish().weight
    assert {name.rpartition(".")[2]: bits for name, bits in stored.bits().items()} == {
        "codes": 3 * 48 * 96, "levels": 4 * 8 * 16, "packed": 6 * 48,
    }  # fmt: skip
    scaled = Jlcm(groups=4, mode="scales").begin(weight, None, Statistics()).finish().weight
    assert {name.rpartition(".")[2]: bits for name, bits in scaled.bits().items()} == {
        "codes": 3 * 48 * 96, "levels": 8 * 16, "scales": 4 * 16, "packed": 6 * 48,
    }  # fmt: skip
    already = Statistics(choices={"": torch.arange(48)})
    absorbed = Jlcm(groups=4).begin(weight, None, already).finish().weight
    assert not absorbed.output_transforms and sum(absorbed.bits().values()) == 3 * 48 * 96 + 4 * 8 * 16
    budget = Jlcm(overhead=0.1).begin(weight, None, Statistics()).finish().weight
    assert sum(bits for name, bits in budget.bits().items() if name.endswith("levels")) == 3 * 8 * 16  # of 460 bits


@pytest.mark.parametrize("mode", ["codebooks", "scales"])
@pytest.mark.parametrize("grouping", ["sorted", "clustered", "unsorted"])
def test_groups_lose_less_than_one_codebook_and_that_less_than_an_even_grid(mode, grouping):
    weight = problem()[0] * torch.exp(torch.randn(48, 1, generator=torch.Generator().manual_seed(1)))
    method = Jlcm(groups=8, mode=mode, grouping=grouping)
    lost = {}
    for name, one in {"groups": method, "one": replace(method, groups=1)}.items():
        lost[name] = float((one.begin(weight, None, Statistics()).finish().weight.decode() - weight).square().sum())
    lowest, highest = weight.min(), weight.max()
    step = (highest - lowest) / 7
    even = ((weight - lowest) / step).round() * step + lowest
    assert lost["groups"] < lost["one"] < float((even - weight).square().sum())


def test_as_many_codewords_as_values_lose_nothing():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, generator=generator).half().float()
    weight = values[torch.randint(8, (48, 96), generator=generator)]
    for mapping in ("scalar", "logits"):
        decoded = Jlcm(groups=4, mapping=mapping).begin(weight, None, Statistics()).finish().weight.decode()
        assert torch.equal(decoded, weight)


def test_the_best_step_is_gone_back_to_and_looking_changes_nothing_else():
    def run(every):
        parameter = torch.nn.Parameter(torch.tensor([3.0]))
        best = BestStep([parameter], lambda: float((parameter.detach() - 2.75).abs()), every)

        def loss(step):
            best.look(step)
            return parameter.square().sum()

        losses = train([{"params": [parameter], "lr": 0.1}], loss, 20)
        best.restore()
        return losses, float(parameter.detach())

    (plain, last), (looked, kept) = run(0), run(1)
    assert plain == looked and last < 2.5 and abs(kept - 2.75) < 0.06


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2))
    with torch.no_grad():
        for layer in model.model.layers:  # channels of very different size, as trained models have them
            factor = torch.exp(torch.randn(48, 1))
            layer.mlp.gate_proj.weight.mul_(factor)
            layer.mlp.up_proj.weight.mul_(factor)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.mark.slow
def test_gated_channels_are_put_in_order_at_no_cost_and_the_model_stays_the_same(folder, tmp_path):
    windows = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(0))
    source, outputs, bits = open_model(folder), {}, {}
    dense = source.load().model(windows).last_hidden_state.detach()
    for name, sorts in {"absorbed": True, "stored": False}.items():
        method = Jlcm(bits=4, groups=4, steps=0, sorts_channels=sorts)
        layers = dict(compress_model(source, Plan(method), windows, tmp_path / name).layers())
        ours = source.load().model
        for layer, stored in layers.items():
            ours.set_submodule(layer.removeprefix("model."), CompressedLinear(stored))
        outputs[name] = ours(windows).last_hidden_state.detach()
        bits[name] = {
            layer: len(stored.weight.output_transforms) for layer, stored in layers.items() if layer.endswith(("gate_proj", "up_proj"))
        }
        gate = layers["model.layers.0.mlp.gate_proj"].weight.decode()
        assert bool((gate.std(1).log().diff() > -1.0).all()) == sorts
    assert set(bits["absorbed"].values()) == {0} and set(bits["stored"].values()) == {1}
    for made in outputs.values():  # the same function in either order of the channels
        assert float((made - dense).square().mean() / dense.square().mean()) < 0.02


def test_values_out_of_range_are_named():
    bad = [({"bits": 9}, "bits=9"), ({"groups": 0}, "groups=0"), ({"overhead": 0.0}, "overhead=0"), ({"mode": "rows"}, "mode='rows'")]
    for values, says in [*bad, ({"gradient": "far"}, "gradient='far'"), ({"mapping": "soft"}, "mapping='soft'")]:
        with pytest.raises(InputError, match=says):
            Jlcm(**values)
    with pytest.raises(InputError, match="mapping='scalar' would be right"):
        Jlcm(bits=8, mapping="logits").begin(torch.zeros(1024, 1024), None, Statistics())


@pytest.mark.slow
def test_on_the_first_blocks_of_the_real_model_learning_both_helps(first_blocks, tmp_path):
    calibration, heldout = fewbits.TextSample(count=16, length=128), fewbits.TextSample("builtin:heldout", 12, 64)
    found, start = {}, Jlcm(bits=2, steps=0)
    methods = {"joint": replace(start, steps=25, look_every=0), "books": replace(start, steps=25, mapping="fixed", look_every=0)}
    for name, method in (methods | {"start": start, "rtn": Rtn(bits=2, group_size=None)}).items():
        fewbits.compress(first_blocks, method, tmp_path / name, calibration=calibration, probe=None)
        found[name] = fewbits.evaluate(tmp_path / name, reference=first_blocks, text=heldout)["results"]["kl_mean"]
    assert found["joint"] < 0.75 * min(found["books"], found["start"]) and max(found["books"], found["start"]) < found["rtn"]
