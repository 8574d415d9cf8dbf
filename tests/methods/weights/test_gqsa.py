import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.core.tensor import from_stored
from fewbits.layers.linear import CompressedLinear
from fewbits.methods.weights.gqsa import Gqsa
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import StreamOptions, compress_model
from fewbits.statistics.hessian import Hessian

sys.path.insert(0, str(Path(__file__).parent))
from layer_problem import heavy_layer, output_error

TRAINED = {"weight_rate": 3e-3, "rate": 1e-3}


def spiked_layer(seed=0):
    """256 x 256 on inputs of a falling spectrum, of which eight channels are ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(256, 256, generator=generator))[0]
    inputs = torch.randn(3072, 256, generator=generator) * torch.exp(-3 * torch.linspace(0, 1, 256)) @ basis.T
    inputs[:, torch.randperm(256, generator=generator)[:8]] *= 10
    hessian = Hessian(256)
    hessian.update(inputs[:2048])
    return 0.02 * torch.randn(256, 256, generator=generator), Statistics(hessian, tokens=2048), inputs[2048:]


def one_shot(method, weight, statistics):
    return method.begin(weight, None, statistics).finish().weight


def test_saliency_that_knows_the_inputs_beats_magnitude():
    for seed in range(3):
        weight, statistics, heldout = spiked_layer(seed)
        lost = {
            name: output_error(weight, one_shot(Gqsa(saliency=name), weight, statistics).decode(), heldout)
            for name in ("obs", "wanda", "magnitude")
        }
        assert max(lost["obs"], lost["wanda"]) < 0.5 * lost["magnitude"]


@pytest.mark.parametrize("columns", [256, 250])
def test_every_row_keeps_as_many_groups_and_the_rest_is_zero(columns):
    weight, statistics, heldout = heavy_layer(columns=columns)
    learned = Gqsa().begin(weight, None, statistics)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.add_(0.1 * parameter.abs().mean() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    stored = learned.finish()
    mask = learned.get_buffer("mask")
    assert mask.sum(1).unique().tolist() == [8]
    wide = mask.repeat_interleave(16, dim=1)[:, :columns]
    decoded = stored.weight.decode()
    assert bool((decoded[~wide] == 0).all()) and float((decoded[wide] != 0).float().mean()) > 0.8
    torch.testing.assert_close(decoded, learned.weight().detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(from_stored(stored.settings(), stored.tensors()).weight.decode(), decoded)
    torch.testing.assert_close(stored.weight.matmul(heldout), heldout @ decoded.T, rtol=1e-4, atol=1e-4)
    # (1 - sparsity) (bits + (16 + bits + index) / G) of every weight, the last group padded
    each = 16 * 4 + 16 + 4 + 4
    assert sum(stored.bits().values()) == 128 * 8 * each


def test_dropped_weights_have_nothing_that_could_be_trained():
    weight, statistics, _ = heavy_layer()
    learned = Gqsa(sparsity=0.75).begin(weight, None, statistics)
    assert learned.kept.numel() == weight.numel() // 4 and learned.scales.numel() == weight.numel() // 64
    inside = weight[learned.get_buffer("mask").repeat_interleave(16, dim=1)]
    assert torch.equal(learned.kept.detach().flatten(), inside)


def test_the_kept_units_are_those_of_the_highest_sums():
    weight, statistics, _ = heavy_layer()
    hessian = statistics[Hessian].matrix
    mask = Gqsa(saliency="wanda").kept_units(weight, hessian)
    scores = (weight.square() * hessian.diagonal()).view(128, 16, 16).sum(-1)
    assert bool((scores[mask].view(128, 8).amin(1) >= scores[~mask].view(128, 8).amax(1)).all())
    inverse = torch.linalg.inv(hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(256).double())
    obs = (weight.square() / inverse.diagonal()).view(128, 16, 16).sum(-1)
    again = Gqsa().kept_units(weight, hessian)
    assert bool((obs[again].view(128, 8).amin(1) >= 0.999 * obs[~again].view(128, 8).amax(1)).all())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3)).save_pretrained(path)
    return path


WINDOWS = torch.randint(64, (24, 32), generator=torch.Generator().manual_seed(0))


def model_of(folder, summary):
    ours = open_model(folder).load()
    for name, stored in summary.layers():
        ours.set_submodule(name, CompressedLinear(stored))
    return ours


def test_training_all_surviving_weights_helps_far_more_than_their_grids(folder, tmp_path):
    dense, lost = open_model(folder).load(), {}
    with torch.no_grad():
        target = dense.model(WINDOWS[16:]).last_hidden_state
        for name, method in {
            "one shot": Gqsa(steps=0),
            "grids": Gqsa(steps=200, learn="grids", **TRAINED),
            "all": Gqsa(steps=200, **TRAINED),
        }.items():
            ours = model_of(folder, compress_model(open_model(folder), Plan(method), WINDOWS[:16], tmp_path / name))
            lost[name] = float((ours.model(WINDOWS[16:]).last_hidden_state - target).square().mean())
    assert lost["all"] < 0.5 * lost["one shot"] and lost["all"] < 0.7 * lost["grids"]


def text_loss(model):
    with torch.no_grad():
        return float(model(input_ids=WINDOWS, labels=WINDOWS).loss)


def test_the_second_stage_lowers_the_loss_and_leaves_codes_and_mask(folder, tmp_path):
    source = open_model(folder)
    before = compress_model(source, Plan(Gqsa(steps=4)), WINDOWS, tmp_path / "blocks")
    after = compress_model(source, Plan(Gqsa(steps=4, tune_steps=40, tune_rate=1e-3)), WINDOWS, tmp_path / "tuned")
    assert text_loss(model_of(folder, after)) < text_loss(model_of(folder, before)) - 0.01
    changed = 0
    for name in ("block-00000.safetensors", "block-00002.safetensors"):
        first, second = (load_file(tmp_path / one / name) for one in ("blocks", "tuned"))
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert key.endswith("scales") or torch.equal(tensor, second[key])
            changed += key.endswith("scales") and not torch.equal(tensor, second[key])
    assert changed == 14
    assert all(layer["tuned"] for layer in after.record()["layers"].values())


def test_a_stopped_second_stage_ends_in_the_same_bytes(folder, tmp_path, monkeypatch):
    source, plan = open_model(folder), Plan(Gqsa(steps=2, tune_steps=6, tune_rate=1e-3))
    compress_model(source, plan, WINDOWS, tmp_path / "whole")

    def stop(block, blocks, text, error, left):
        if text.startswith("tuning, step 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(source, plan, WINDOWS, tmp_path / "training", StreamOptions(progress=stop))

    from fewbits.pipeline.store import Store

    write = Store.write_block

    def fail(self, block, layers, entries, replaced=None):
        if block == 1 and any(entry.get("tuned") for entry in entries["layers"].values()):
            raise KeyboardInterrupt
        write(self, block, layers, entries, replaced)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_block", fail)
        with pytest.raises(KeyboardInterrupt):
            compress_model(source, plan, WINDOWS, tmp_path / "writing")
    for name in ("training", "writing"):
        compress_model(source, plan, WINDOWS, tmp_path / name)
        for path in sorted((tmp_path / "whole").glob("block-*")):
            assert path.read_bytes() == (tmp_path / name / path.name).read_bytes()


def test_more_sparsity_loses_more(folder, tmp_path):
    weight, statistics, heldout = spiked_layer()
    lost = [
        output_error(weight, one_shot(Gqsa(sparsity=share), weight, statistics).decode(), heldout) for share in (0.2, 0.3, 0.4, 0.5, 0.6)
    ]
    assert lost == sorted(lost)


def test_values_out_of_range_are_named():
    for values, says in [({"bits": 1}, "bits=1"), ({"sparsity": 1.0}, "sparsity=1"), ({"saliency": "size"}, "saliency='size'")]:
        with pytest.raises(InputError, match=says):
            Gqsa(**values)


@pytest.mark.slow
def test_each_stage_helps_the_real_model(first_blocks, tmp_path):
    """The first stage where its time goes, in blocks; the second, which reads the text's loss, on the whole model."""
    calibration, heldout = fewbits.TextSample(count=16, length=64), fewbits.TextSample("builtin:heldout", 24, 64)

    def lost(model, key, **fields):
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        fewbits.compress(model, Gqsa(**TRAINED, **fields), output, calibration=calibration, probe=None)
        return fewbits.evaluate(output, reference=model, text=heldout)["results"][key]

    assert lost(first_blocks, "kl_mean", steps=40) < 0.5 * lost(first_blocks, "kl_mean", steps=0)
    once = lost("builtin:tiny-lm", "delta_loss", steps=0)
    assert lost("builtin:tiny-lm", "delta_loss", steps=0, tune_steps=20, tune_rate=1e-4) < 0.8 * once
