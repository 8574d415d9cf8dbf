import copy
import dataclasses
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.core.errors import InputError, NumericsError
from fewbits.core.tensor import from_stored
from fewbits.export.checkpoint import load_checkpoint, write_checkpoint
from fewbits.layers.conv import CompressedConv2d
from fewbits.layers.linear import CompressedLinear, stored_bits
from fewbits.methods.weights.udfc import Udfc
from fewbits.models.channels import find_channels
from fewbits.models.source import open_model

ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("FEWBITS_DATA", ROOT.parent / "shared" / "data"))
RESNET = DATA / "vision" / "resnet20-12fca82f.th"
CIFAR = DATA / "images" / "cifar10_test_lossless_recovered.npz"


def rewritten(model, **fields):
    made = copy.deepcopy(model)
    Udfc(**fields).rewrite(made)
    return made


@torch.no_grad()
def toy(seed=0):
    """64 -> 256 -> 64 with batch normalization and ReLU; filters of rank 40 and a little noise; Gaussian inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    model = nn.Sequential(nn.Linear(64, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64, bias=False)).eval()
    model[0].weight.copy_((normal(256, 40) @ normal(40, 64) / 40**0.5 + 0.05 * normal(256, 64)) / 8)
    model[1].weight.copy_(1 + 0.3 * normal(256))
    model[1].bias.copy_(0.3 * normal(256))
    model[3].weight.copy_(normal(64, 256) / 16)
    return model, normal(2048, 64)


@torch.no_grad()
def lost(*, then=None, seeds=2, **fields):
    """Squared output error over the outputs' variance, mean of seeds; `then`: fields of a second rewriting."""
    total = 0.0
    for seed in range(seeds):
        model, inputs = toy(seed)
        made = rewritten(model, **{"bias_weight": 1.0, "penalty": 1.0, **fields})
        made = made if then is None else rewritten(made, **then)
        outputs = model(inputs)
        total += float((made(inputs) - outputs).square().sum() / (outputs - outputs.mean(0)).square().sum())
    return total / seeds


@torch.no_grad()
def conv_net(seed=0):
    """Plain and depthwise convolutions, a flattened image and linear layers; statistics as after training."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU(), nn.Conv2d(12, 10, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(160, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip
    for norm in (model[1], model[4], model[13]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    return model.eval(), torch.randn(4, 3, 8, 8)


# The toy layer of the specification


def test_closed_form_beats_merging_beats_pruning_alone():
    for share, least, most in ((0.1, 0.02, 0.08), (0.3, 0.15, 0.3), (0.5, 0.3, 0.6)):
        alone, merged, solved = (lost(share=share, bits=None, repair=repair) for repair in ("none", "merging", "full"))
        assert least < alone < most and merged < 0.9 * alone and solved < 0.65 * alone and solved < 0.85 * merged


def test_repairing_what_was_pruned_helps_at_every_width_and_repairing_what_was_rounded_most_at_two_bits():
    for bits, ratio in ((3, 0.8), (4, 0.65), (6, 0.65)):
        alone, pruned, full = (lost(share=0.3, bits=bits, repair=repair) for repair in ("none", "pruned", "full"))
        assert pruned < ratio * alone and full < pruned * 1.01
    alone, pruned, full = (lost(share=0.3, bits=2, repair=repair) for repair in ("none", "pruned", "full"))
    assert full < 0.85 * pruned and pruned < alone


def test_rounding_errors_alone_are_repaired_better_by_all_channels_than_by_one_factor():
    for bits, scalar_ratio, full_ratio in ((2, 0.95, 0.86), (3, 0.99, 0.91), (4, 1.0, 0.95)):
        alone, scalar, full = (lost(share=0.0, bits=bits, repair=repair) for repair in ("none", "scalar", "full"))
        assert scalar < scalar_ratio * alone and full < full_ratio * alone and full < scalar


def test_the_papers_absolute_values_regularize_too_little_here():
    # The mean diagonal of K K^T and the inputs' variance are about 1 here: absolute and relative values agree.
    assert lost(share=0.3, bits=None) < 0.92 * lost(share=0.3, bits=None, bias_weight=0.01, penalty=0.008)


def test_together_is_better_than_one_after_the_other_and_most_at_few_bits():
    gains = []
    for bits in (2, 3, 4, 6):
        together = lost(share=0.3, bits=bits)
        separate = lost(share=0.3, bits=None, then={"share": 0.0, "bits": bits, "repair": "none"})
        gains.append(separate / together)
    assert gains[0] > 1.15 and min(gains) > 0.99 and gains[0] == max(gains)


def test_without_the_bias_or_without_a_penalty_it_fails():
    assert lost(share=0.3, bits=None, bias_weight=0.0) > 1.1 * lost(share=0.3, bits=None)
    with pytest.raises(NumericsError, match="linearly dependent"):
        lost(share=0.3, bits=None, penalty=0.0)  # 179 channels with filters of 64 weights
    assert lost(share=0.3, bits=2, penalty=1e-9) > 1.1 * lost(share=0.3, bits=2)


def test_activations_that_the_relu_lets_through_say_more_than_filters():
    for share in (0.1, 0.3, 0.5):
        assert lost(share=share, bits=None, space="activations", penalty=0.01) < 0.7 * lost(share=share, bits=None)


# Exactness


@pytest.mark.parametrize("repair", ["none", "merging", "pruned", "scalar", "full"])
@torch.no_grad()
def test_nothing_pruned_and_nothing_rounded_is_the_identity(repair):
    model, inputs = conv_net()
    made = rewritten(model, share=0.0, bits=None, repair=repair)
    torch.testing.assert_close(made(inputs), model(inputs), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in made.modules())


@pytest.mark.parametrize("space", ["filters", "activations"])
@pytest.mark.parametrize("offset", ["mean", "bias"])
@torch.no_grad()
def test_multiples_of_other_filters_are_restored_through_relu_and_flattening(space, offset):
    model, inputs = conv_net()
    for layer, norm in ((model[0], model[1]), (model[9], None), (model[12], model[13])):  # the second half: a tenth of the first
        half = len(layer.weight) // 2
        for owner, name in (
            (layer, "weight"),
            (layer, "bias"),
            (norm, "running_var"),
            (norm, "running_mean"),
            (norm, "weight"),
            (norm, "bias"),
        ):
            values = getattr(owner, name, None)
            if values is not None:
                last = owner is (layer if norm is None else norm) and name in ("weight", "bias")
                values[half:] = values[:half] * (0.1 if last else 1)
    made = rewritten(model, share=0.5, bits=None, penalty=1e-9, offset=offset, space=space)
    assert made[0].out_channels == 4 and made[9].out_channels == 5 and made[12].in_features == 80 and made[12].out_features == 8
    torch.testing.assert_close(made(inputs), model(inputs), atol=1e-4, rtol=1e-4)
    damaged = rewritten(model, share=0.5, bits=None, repair="none")
    assert (damaged(inputs) - model(inputs)).abs().max() > 0.01


@torch.no_grad()
def test_factors_are_the_papers_closed_form():
    model, inputs = toy()
    bias_weight, penalty = 0.3, 0.2
    made = rewritten(model, share=0.25, bits=4, bias_weight=bias_weight, penalty=penalty, repair="pruned")
    folded = (model[0].weight * (model[1].weight / (model[1].running_var + model[1].eps).sqrt())[:, None]).double()
    shift, removed = model[1].bias.double(), folded.norm(dim=1).argsort()[:64]
    kept = torch.tensor([i for i in range(256) if i not in set(removed.tolist())])
    stored = made[0].weight.double()
    assert (stored - folded[kept]).abs().max() <= 0.51 * (2 * folded.abs().amax(1).max() / 15)
    a1 = bias_weight * folded.square().sum(1).mean() / model[1].weight.double().square().mean()
    a2 = penalty * (stored.square().sum(1) + a1 * shift[kept].square()).mean()
    matrix = stored @ stored.T + a1 * shift[kept, None] * shift[kept] + a2 * torch.eye(192)
    factors = torch.linalg.solve(matrix, stored @ folded[removed].T + a1 * shift[kept, None] * shift[removed])
    second = model[3].weight.double()
    absorbed = second[:, kept] + second[:, removed] @ factors.T
    grid = 2 * absorbed.abs().amax(1, keepdim=True) / 15  # rounded to 4 bits after it was absorbed
    assert ((made[3].weight.double() - absorbed).abs() <= 0.51 * grid + 1e-3 * absorbed.abs()).all()
    assert torch.isfinite(made(inputs)).all()


@torch.no_grad()
def test_one_factor_mends_depthwise_channels_and_none_is_pruned():
    model, inputs = conv_net()
    made = rewritten(model, share=0.3, bits=8)
    assert made[3].out_channels == made[7].out_channels == made[9].in_channels == 12
    assert made[0].out_channels == 6 and made[12].in_features == 7 * 16 and made[12].out_features == 11
    errors = [(rewritten(model, share=0.0, bits=2, repair=r)(inputs) - model(inputs)).square().mean() for r in ("none", "scalar")]
    assert errors[0] != errors[1]


# Storage


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_stored_bits_are_those_of_the_formula(bits):
    model, _ = conv_net()
    made = rewritten(model, share=0.25, bits=bits)
    expected = 0
    for weights, rows in ((27, 6), (6 * 9, 12), (9, 12), (12, 8), (8 * 16, 12), (12, 5)):
        expected += rows * (-(-weights * bits // 8) * 8) + 16 * rows + 16 * rows  # rows end on whole bytes; scale, bias
    assert stored_bits(made) == expected
    assert all(isinstance(module, (CompressedConv2d, CompressedLinear)) for module in made if next(module.parameters(), None) is not None)


@torch.no_grad()
def test_a_state_dict_goes_into_another_model_of_the_same_settings():
    model, inputs = conv_net()
    made, other = rewritten(model, share=0.3, bits=4), rewritten(conv_net(1)[0], share=0.3, bits=4)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(inputs), made(inputs))
    for module in made:
        if isinstance(module, CompressedConv2d):
            assert from_stored(module.settings, module.stored.tensors()).settings() == module.settings


@torch.no_grad()
def test_a_filter_without_gain_and_one_of_zeros_are_stored_as_zeros():
    model, inputs = conv_net()
    model[1].weight[2], model[3].weight[1] = 1e-9, 0.0
    made = rewritten(model, share=0.0, bits=4)
    assert made[0].weight[2].count_nonzero() == 0 and made[3].weight[1].count_nonzero() == 0
    assert torch.isfinite(made(inputs)).all()


@torch.no_grad()
def test_a_layer_of_zeros_goes_through():
    model, inputs = conv_net()
    model[9].weight.zero_()
    for space in ("filters", "activations"):
        assert torch.isfinite(rewritten(model, share=0.3, bits=4, space=space)(inputs)).all()


def test_an_error_leaves_the_model_as_it_was():
    model, inputs = conv_net()
    model[4].bias.data[:] = 1e6
    before = model(inputs)
    with pytest.raises(NumericsError, match="fp16"):
        Udfc(bits=4).rewrite(model)
    assert torch.equal(model(inputs), before)


# Trained networks


@pytest.fixture(scope="module")
def trained():
    pytest.importorskip("sklearn", reason="scikit-learn is not there")
    bench = runpy.run_path(str(ROOT / "benchmarks" / "udfc_digits.py"))
    training, test = bench["digits"]()
    models = {}
    for name in ("plain", "residual"):
        torch.manual_seed(0)
        models[name] = bench["train"](bench[name](), training)
    return models, lambda model, **fields: bench["accuracy"](rewritten(model, **fields) if fields else model, test)


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_trained_digits_survive_pruning(trained, name):
    models, accuracy = trained
    model = models[name]
    assert accuracy(model) > 0.98
    for share in (0.3, 0.5):
        alone, solved = (accuracy(model, share=share, bits=None, repair=repair) for repair in ("none", "full"))
        merged = accuracy(model, share=share, bits=None, repair="merging")
        behind = accuracy(model, share=share, bits=None, space="activations")
        assert alone + 0.05 < solved < behind and alone < merged < behind + 0.03
    assert accuracy(model, share=0.3, bits=4, space="activations") > accuracy(model) - 0.1
    assert accuracy(model, share=0.0, bits=6) > accuracy(model) - 0.01


class Block(nn.Module):
    """A block of ResNet-20 for CIFAR-10: a wider one's shortcut leaves pixels out and adds empty channels."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.added = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 2 if self.added else 1, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x):
        hidden = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2))
        return F.relu(hidden + x)


class ResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(x, x.size()[3]).view(x.size(0), -1))


@pytest.fixture(scope="module")
def resnet():
    if not RESNET.is_file() or not CIFAR.is_file():
        pytest.skip(f"{RESNET} or {CIFAR} is not there")
    model = ResNet20().eval()
    values = torch.load(RESNET, weights_only=True, map_location="cpu")["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in values.items()})
    images = np.load(CIFAR)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    inputs, labels = (torch.tensor(images["x"]).float() / 255 - mean) / deviation, torch.tensor(images["y"]).long()
    with torch.no_grad():
        dense = model(inputs)

    @torch.no_grad()
    def measured(**fields):
        """Accuracy, and the logits' squared error over their squares."""
        outputs = rewritten(model, **fields)(inputs) if fields else dense
        return float((outputs.argmax(1) == labels).float().mean()), float((outputs - dense).square().sum() / dense.square().sum())

    return model, measured


def test_a_real_resnet_keeps_its_accuracy_in_the_papers_order(resnet):
    _, measured = resnet
    assert measured()[0] == pytest.approx(0.9506, abs=1e-3)
    alone, merged, solved = (measured(share=0.2, bits=None, repair=repair)[0] for repair in ("none", "merging", "full"))
    assert alone + 0.02 < merged < solved - 0.02
    behind = measured(share=0.2, bits=None, space="activations")[0]
    assert behind > solved + 0.05
    assert measured(share=0.3, bits=None, space="activations")[0] > measured(share=0.3, bits=None, repair="merging")[0] + 0.1


def test_a_real_resnet_needs_the_offsets_and_their_means(resnet):
    _, measured = resnet
    ours, without, folded = (measured(share=0.3, bits=None, **f)[1] for f in ({}, {"bias_weight": 0.0}, {"offset": "bias"}))
    assert ours < 0.9 * without and ours < 0.9 * folded


def test_a_real_resnet_in_few_bits(resnet):
    model, measured = resnet
    assert measured(share=0.0, bits=6)[0] > 0.94
    rounded, repaired = (measured(share=0.2, bits=6, repair=repair)[0] for repair in ("none", "full"))
    assert repaired > rounded + 0.08
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear)))
    assert 4.8 < stored_bits(rewritten(model, share=0.2, bits=6)) / weights < 5.2


# Language models


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


@torch.no_grad()
def test_a_gated_mlp_loses_hidden_channels_and_duplicates_are_restored_through_up():
    model, tokens = llama(), torch.arange(12)[None]
    for layer in model.model.layers:  # the second half: the same gates, a tenth of the ups
        layer.mlp.gate_proj.weight[24:] = layer.mlp.gate_proj.weight[:24]
        layer.mlp.up_proj.weight[24:] = 0.1 * layer.mlp.up_proj.weight[:24]
        layer.mlp.up_proj.weight *= 30
    for fields in ({}, {"space": "activations"}):
        made = rewritten(model, share=0.5, bits=None, penalty=1e-9, **fields)
        assert made.model.layers[1].mlp.up_proj.out_features == made.model.layers[1].mlp.down_proj.in_features == 24
        torch.testing.assert_close(made(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-3)
    assert (rewritten(model, share=0.5, bits=None, repair="none")(tokens).logits - model(tokens).logits).abs().max() > 1e-3


@torch.no_grad()
def test_smaller_mlps_go_into_a_folder_and_come_back(tmp_path):
    model, tokens = llama(), torch.arange(12)[None]
    model.save_pretrained(tmp_path / "dense")
    made = rewritten(model, share=0.25, bits=4)
    layers = [(name, module.stored) for name, module in made.named_modules() if isinstance(module, CompressedLinear)]
    assert len(layers) == 6 and layers[2][1].weight.shape == (32, 36)
    source = open_model(tmp_path / "dense")
    source.tokenizer = lambda: None
    write_checkpoint(tmp_path / "out", source, lambda: layers, lambda folder: ({}, ""))
    torch.testing.assert_close(load_checkpoint(tmp_path / "out")(tokens).logits, made(tokens).logits)


@pytest.mark.slow
@torch.no_grad()
def test_the_built_in_model_loses_little_with_a_tenth_of_its_hidden_channels():
    model = open_model("builtin:tiny-lm").load()
    made = rewritten(model, share=0.1, bits=6)
    assert len(find_channels(model).links) == model.config.num_hidden_layers
    tokens = torch.arange(100, 356)[None]
    logs = [one(tokens).logits.log_softmax(-1) for one in (model, made)]
    assert float(F.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean") / tokens.numel()) < 0.05
    dense = 3 * model.config.intermediate_size * model.config.hidden_size * model.config.num_hidden_layers
    assert stored_bits(made) / dense < 0.9 * 6.2


# Wrong input


def test_values_out_of_range_and_models_without_layers_are_named():
    for fields, message in (
        ({"share": 1.0}, "share=1.0"), ({"bits": 9}, "bits=9"), ({"penalty": -1.0}, "penalty=-1"), ({"repair": "all"}, "repair='all'"),
        ({"criterion": "l3"}, "criterion='l3'"), ({"offset": "x"}, "offset='x'"), ({"space": "x"}, "space='x'"),
        ({"search": "x"}, "search='x'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            dataclasses.replace(Udfc(), **fields)
    with pytest.raises(InputError, match="no convolution"):
        Udfc().rewrite(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(InputError, match="no convolution"):
        rewritten(rewritten(conv_net()[0], bits=4), bits=4)


def test_ranges_of_inputs_come_from_the_normalization_before_them():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.SiLU(), nn.Flatten(), nn.Linear(5 * 16, 3),
    )  # fmt: skip
    for norm in (model[1], model[5]):
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.uniform_(norm.bias, -1, 1)
    reach = [(norm.bias + 6 * norm.weight).max() for norm in (model[1], model[5])]
    low = (6 * model[5].weight - model[5].bias).max()
    images = torch.randn(64, 1, 8, 8)
    with torch.no_grad():
        model.train()(images)  # means and variances of these images
    outputs, errors = model.eval()(images).detach(), {}
    for bits in (None, 8, 4):
        changed = rewritten(model, share=0.0, bits=8, activation_bits=bits)
        errors[bits] = float((changed(images) - outputs).square().mean() / outputs.var())
    layers = [one for one in rewritten(model, share=0.0, bits=8, activation_bits=8).modules() if hasattr(one, "stored")]
    first, second, third = (one.stored.activation for one in layers)
    assert first is None and not second.signed and third.signed
    torch.testing.assert_close(second.scale[0] * 255, reach[0].detach())
    torch.testing.assert_close(third.scale[0] * 127, torch.maximum(reach[1], low).detach())
    assert errors[None] < errors[8] < 0.02 < errors[4] < 1
    with pytest.raises(InputError, match="activation_bits"):
        Udfc(bits=None, activation_bits=8)
