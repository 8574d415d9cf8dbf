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
from fewbits.methods.weights.ptq161 import Ptq161
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import StreamOptions, compress_model
from fewbits.statistics.moments import Moments
from fewbits.statistics.ranges import Ranges

sys.path.insert(0, str(Path(__file__).parent))
from layer_problem import heavy_layer, output_error


def boosted_layer(seed=0):
    """256 x 512, six input channels ten times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2048, 512, generator=generator)
    inputs[:, torch.randperm(512, generator=generator)[:6]] *= 10
    statistics = Statistics(Moments(512), Ranges(512), tokens=1024)
    for one in statistics:
        one.update(inputs[:1024])
    return 0.02 * torch.randn(256, 512, generator=generator), statistics, inputs[1024:]


def stand_in(method=Ptq161(), seed=0):
    weight, statistics, heldout = heavy_layer(seed)
    return method.begin(weight, None, statistics), weight, heldout


def moved(learned):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.add_(0.3 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))
    return learned


def test_channels_of_large_activations_are_the_ones_to_keep():
    lost = {}
    for seed in range(12):
        weight, statistics, heldout = boosted_layer(seed)
        for channels in ("mean", "max", "weight", "random", "least"):
            stored = Ptq161(channels=channels, seed=seed).begin(weight, None, statistics).finish()
            lost.setdefault(channels, []).append(output_error(weight, stored.weight.decode(), heldout))
    mean = {name: sum(values) / 12 for name, values in lost.items()}
    assert mean["mean"] < 0.7 * min(mean["weight"], mean["random"]) and mean["max"] < 0.7 * mean["random"]
    assert mean["least"] > 0.99 * max(mean.values()) and 0.85 < mean["weight"] / mean["random"] < 1.15


def test_with_angles_of_one_the_weight_is_the_two_level_grid():
    learned, weight, _ = stand_in()
    salient = learned.get_buffer("salient")
    kept = weight[:, ~salient]
    mean, alpha = kept.mean(1, keepdim=True), kept.abs().mean(1, keepdim=True)
    expected = torch.where(kept >= mean, alpha, -alpha) + mean
    torch.testing.assert_close(learned.weight().detach()[:, ~salient], expected, rtol=2e-3, atol=2e-5)
    full = weight[:, salient]
    step = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / 15
    assert bool(((learned.weight().detach()[:, salient] - full).abs() <= 0.51 * step).all())


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_what_is_stored_is_what_was_trained_and_takes_the_bits_it_says(share):
    learned, weight, heldout = stand_in(Ptq161(share=share))
    stored = moved(learned).finish()
    torch.testing.assert_close(stored.weight.decode(), learned.weight().detach(), rtol=1e-6, atol=1e-7)
    again = from_stored(stored.settings(), stored.tensors())
    assert torch.equal(again.weight.decode(), stored.weight.decode())
    torch.testing.assert_close(stored.weight.matmul(heldout), heldout @ stored.weight.decode().T, rtol=1e-4, atol=1e-4)
    rows, columns = weight.shape
    kept = round(share * columns)
    assert int(learned.get_buffer("salient").sum()) == kept
    expected = columns
    if kept:
        expected += rows * 8 * -(-4 * kept // 8) + rows * (16 + 8)  # a 4-bit zero point of a row fills a byte
    if kept < columns:
        expected += rows * 8 * -(-(columns - kept) // 8) + rows * 32 + 16 * (columns - kept)
    assert sum(stored.bits().values()) == expected


def test_every_binary_row_has_two_values_once_its_columns_are_unscaled():
    learned, _, _ = stand_in()
    stored = moved(learned).finish()
    scaled = stored.weight.terms[0].parts[1]
    rows = scaled.inner.decode()
    assert all(row.unique().numel() == 2 for row in rows)
    assert torch.equal(stored.weight.decode()[:, ~learned.get_buffer("salient")], rows * scaled.scale.float())


def test_signs_means_and_salient_codes_are_not_trained():
    learned, _, _ = stand_in()
    names = {name for name, one in learned.named_parameters() if one.requires_grad}
    assert names == {"alpha", "rows", "columns"}
    assert {name for name, one in stand_in(Ptq161(learn="alpha"))[0].named_parameters() if one.requires_grad} == {"alpha"}
    before = learned.finish()
    after = moved(learned).finish()
    first, second = (dict(one.tensors()) for one in (before, after))
    assert all(torch.equal(first[name], second[name]) for name in first if name.endswith(("signs", "codes", "bits_set", "zero_points")))


def test_the_loss_compares_with_both_targets_and_takes_the_log_of_the_mean_cosine():
    generator = torch.Generator().manual_seed(0)
    ours, dense, mixed = torch.randn(3, 2, 5, 8, generator=generator)
    by_hand = 0.0
    for target in (dense, mixed):
        cosines = (ours * target).sum(-1) / ours.norm(dim=-1) / target.norm(dim=-1)
        by_hand += (ours - target).square().mean() - cosines.mean().abs().log()
    torch.testing.assert_close(Ptq161().loss(ours, dense, mixed), by_hand, rtol=1e-4, atol=0)
    torch.testing.assert_close(Ptq161(angles=0, targets="dense").loss(ours, dense, mixed), (ours - dense).square().mean())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3)).save_pretrained(path)
    return path


WINDOWS = torch.randint(64, (16, 32), generator=torch.Generator().manual_seed(0))


def distance(folder, summary):
    dense, ours = open_model(folder).load().model, open_model(folder).load().model
    for name, stored in summary.layers():
        ours.set_submodule(name.removeprefix("model."), CompressedLinear(stored))
    with torch.no_grad():
        left, right = dense(WINDOWS[8:]).last_hidden_state, ours(WINDOWS[8:]).last_hidden_state
    return float((left - right).square().mean() / left.square().mean())


def test_training_lowers_the_loss_and_more_so_with_the_angles(folder, tmp_path):
    seen = {}

    def watch(block, blocks, text, value, left):
        if "step" in text and "layers.0," in text:
            seen.setdefault(name, []).append(value)

    lost = {}
    for name, method in {
        "none": Ptq161(steps=0),
        "alpha": Ptq161(steps=120, rate=2e-3, angle_rate=1e-2, learn="alpha"),
        "all": Ptq161(steps=120, rate=2e-3, angle_rate=1e-2),
        "without the dense states": Ptq161(steps=120, rate=2e-3, angle_rate=1e-2, targets="mixed"),
    }.items():
        lost[name] = distance(
            folder, compress_model(open_model(folder), Plan(method), WINDOWS[:8], tmp_path / name, StreamOptions(progress=watch))
        )
    first, last = (sum(values) / 15 for values in (seen["all"][:15], seen["all"][-15:]))
    assert last < 0.8 * first
    assert lost["all"] < lost["alpha"] < lost["none"]
    assert lost["all"] < 0.95 * lost["without the dense states"]


def test_a_repaired_model_is_compressed_anew_and_a_stopped_repair_goes_on(folder, tmp_path):
    method = Ptq161(steps=4, restore_steps=6, restore_rank=4, restore_rate=1e-3)
    summary = compress_model(open_model(folder), Plan(method), WINDOWS, tmp_path / "whole")
    assert len(dict(summary.layers())) == 21 and not (tmp_path / "whole" / "first").exists()
    repaired = load_file(tmp_path / "whole" / "state-restored.safetensors")
    first = dict(compress_model(open_model(folder), Plan(Ptq161(steps=4)), WINDOWS, tmp_path / "plain").layers())
    for name, weight in repaired.items():
        change = weight - first[name].weight.decode()  # from the compressed weights, by a matrix of small rank
        assert 1 <= int(torch.linalg.matrix_rank(change, rtol=1e-4)) <= 4
    dense = compress_model(
        open_model(folder), Plan(Ptq161(steps=4, restore_steps=6, restore_rank=4, restore_start="dense")), WINDOWS, tmp_path / "dense"
    )
    assert dict(dense.layers()).keys() == repaired.keys()

    for stage in ("repairing, step 3", "model.layers.1, 1 in the window"):

        def stop(block, blocks, text, error, left, stage=stage):
            if text.startswith(stage):
                raise KeyboardInterrupt

        work = tmp_path / stage.split(",")[0]
        with pytest.raises(KeyboardInterrupt):
            compress_model(open_model(folder), Plan(method), WINDOWS, work, StreamOptions(progress=stop))
        compress_model(open_model(folder), Plan(method), WINDOWS, work)
        for block in range(3):
            name = f"block-0000{block}.safetensors"
            assert (work / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_padding_is_refused_where_text_is_trained_on(folder, tmp_path):
    mask = torch.ones_like(WINDOWS, dtype=torch.bool)
    mask[0, 20:] = False
    with pytest.raises(InputError, match="leave --separate out"):
        compress_model(
            open_model(folder), Plan(Ptq161(steps=1, restore_steps=1, restore_start="dense")), WINDOWS, tmp_path / "w", mask=mask
        )


def test_values_out_of_range_are_named():
    for values, says in [({"share": 1.5}, "share=1.5"), ({"salient_bits": 1}, "salient_bits=1"), ({"channels": "all"}, "channels='all'")]:
        with pytest.raises(InputError, match=says):
            Ptq161(**values)


@pytest.mark.slow
def test_on_the_first_blocks_of_the_real_model_it_beats_two_bits_of_round_to_nearest_at_fewer_bits(first_blocks, tmp_path):
    calibration, heldout = fewbits.TextSample(count=12, length=64), fewbits.TextSample("builtin:heldout", 16, 64)
    found = {}
    for name, method in {"rtn": Rtn(bits=2), "none": Ptq161(steps=0), "learned": Ptq161(steps=40, rate=2e-3, angle_rate=1e-2)}.items():
        fewbits.compress(first_blocks, method, tmp_path / name, calibration=calibration, probe=None)
        found[name] = fewbits.evaluate(tmp_path / name, reference=first_blocks, text=heldout)["results"]["kl_mean"]
    assert found["learned"] < 0.7 * found["none"] and found["learned"] < found["rtn"]
