import math
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import fewbits
from fewbits.core.errors import InputError
from fewbits.export.module import load_module, save_module
from fewbits.formats.additive import Additive
from fewbits.formats.decoded_codes import DecodedCodes
from fewbits.layers.conv import CompressedConv2d
from fewbits.layers.linear import CompressedLinear, stored_bits, whole_bits
from fewbits.methods.weights.lr2vq import LowRankCodes, Lr2vq, split, split_error, subvectors
from fewbits.pipeline.stages import train_stages
from fewbits.solvers.vector_kmeans import cluster_vectors, nearest

ROOT = Path(__file__).parents[3]
FEW = {"entries": 16, "linear_entries": 32, "least": 100, "pretrain_steps": 4, "finetune_steps": 4, "norm_steps": 2}


def conv_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2, padding_mode="reflect"), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 4, 1), nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 5),
    )  # fmt: skip


def batches(seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 3, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator)) for _ in range(count)]


def clustered(layer, **fields):
    made = LowRankCodes(Lr2vq(**fields), layer)
    made.cluster()
    return made


# Exactness


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 64, 3), nn.Conv2d(7, 64, 3), nn.Conv2d(18, 64, 1), nn.Linear(62, 32)], ids=str)
@torch.no_grad()
def test_merged_and_factored_forms_compute_the_same(layer):
    learned = clustered(layer, share=0.5, entries=16, linear_entries=16)
    weight = layer.weight.flatten(1)
    codes = learned.codes.view(len(weight), -1)
    factored = DecodedCodes.from_codes(codes, learned.codebook, learned.decoder, columns=weight.shape[1])
    merged = Additive.from_codes(codes[:, :, None], (learned.codebook @ learned.decoder)[None], columns=weight.shape[1])
    torch.testing.assert_close(factored.decode(), merged.decode(), atol=1e-6, rtol=0)
    inputs = torch.randn(3, weight.shape[1])
    torch.testing.assert_close(factored.matmul(inputs), merged.matmul(inputs), atol=1e-5, rtol=1e-5)
    assert ((merged.decode() - weight).square().sum() < 0.9 * weight.square().sum()).all()


@torch.no_grad()
def test_the_whole_dimension_is_plain_vector_quantization():
    layer = nn.Conv2d(16, 64, 3)
    cut = layer.weight.view(-1, 18)  # two input channels' kernels
    centroids, codes = cluster_vectors(cut, 32, seed=3)
    plain = clustered(layer, share=1.0, entries=32, seed=3)
    assert torch.equal(plain.codes, codes)
    assert torch.equal(plain.tensor().decode(), centroids.half().float()[codes].view(64, -1))


@torch.no_grad()
def test_another_orthogonal_decoder_of_the_whole_dimension_gives_the_same_codes():
    layer = nn.Conv2d(16, 64, 3)
    plain, turned = clustered(layer, share=1.0, entries=32), LowRankCodes(Lr2vq(share=1.0, entries=32), layer)
    turn = torch.linalg.qr(torch.randn(18, 18, generator=torch.Generator().manual_seed(0)))[0]
    turned.vectors.copy_(turned.vectors @ turn.T)
    turned.decoder.copy_(turn)
    turned.cluster()
    assert torch.equal(turned.codes, plain.codes)
    torch.testing.assert_close(turned.codebook @ turned.decoder, plain.codebook, atol=1e-6, rtol=0)


def test_the_gradient_of_a_codebook_is_the_sum_over_its_members():
    learned = clustered(nn.Conv2d(8, 32, 3), share=0.5, entries=8)
    gradient = torch.randn(32, 72, generator=torch.Generator().manual_seed(1))
    (learned.matrix() * gradient).sum().backward()
    cut, decoder = gradient.view(-1, 18), learned.decoder.detach()
    expected = torch.stack([cut[learned.codes == entry].sum(0) @ decoder.T for entry in range(8)])
    torch.testing.assert_close(learned.codebook.grad, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(learned.decoder.grad, learned.codebook.detach()[learned.codes].T @ cut, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_clustering_sees_distances_of_weights_whatever_the_factors_are():
    layer = nn.Linear(64, 64)
    mixed, plain = (LowRankCodes(Lr2vq(share=0.5, linear=16, linear_entries=16), layer) for _ in range(2))
    mixing = torch.diag(torch.logspace(-1, 1, 8)) @ torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    mixed.vectors.copy_(mixed.vectors @ mixing)
    mixed.decoder.copy_(torch.linalg.inv(mixing) @ mixed.decoder)
    for learned in (mixed, plain):
        before = learned.matrix()
        learned.cluster()
        torch.testing.assert_close(learned.decoder @ learned.decoder.T, torch.eye(8), atol=1e-5, rtol=0)
        torch.testing.assert_close((learned.vectors @ learned.decoder).view(64, 64), before, atol=1e-4, rtol=0)
    assert (mixed.codes == plain.codes).float().mean() > 0.99 and abs(mixed.cluster_error - plain.cluster_error) < 1e-3


# Storage


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_merged_size_is_the_formula_whatever_the_dimension(share):
    made, record = train_stages(conv_net(), Lr2vq(**FEW, share=share), batches())
    layers = {name: module for name, module in made.named_modules() if isinstance(module, (CompressedConv2d, CompressedLinear))}
    # filters, subvectors in each, m, k: a codebook has at most a quarter as many entries as there are subvectors
    expected = {"3": (16, 4, 18, 16), "6": (32, 4, 4, 16), "8": (4, 8, 4, 8), "10": (32, 9, 4, 32), "12": (5, 8, 4, 8)}
    assert layers.keys() == expected.keys()
    total = 0
    for name, (rows, groups, length, count) in expected.items():
        bits = rows * 8 * math.ceil(groups * math.log2(count) / 8) + 16 * count * length
        assert sum(layers[name].stored.bits().values()) == bits
        total += bits + 32 * layers[name].bias.numel()
    assert stored_bits(made) == total
    norms = 32 * 4 * (8 + 16) + 2 * 64  # weights, biases, means, variances; counted batches
    assert whole_bits(made) == total + norms + 32 * 8 * 27
    assert record[0]["notes"]["kept"] == {"0": "first convolution"}


@torch.no_grad()
def test_the_factored_form_is_stored_where_it_is_smaller():
    layer, sizes = nn.Conv2d(32, 64, 3), {}
    for storage in ("merged", "factored", "smaller"):
        for dimension in (4, 18):
            learned = clustered(layer, share=dimension / 18, entries=64, storage=storage)
            stored = learned.finish().stored
            assert torch.equal(stored.weight.decode().view_as(layer.weight), learned.matrix().view_as(layer.weight))
            sizes[storage, dimension] = sum(stored.bits().values())
    codes = 1024 * 6
    assert sizes["merged", 4] == sizes["merged", 18] == codes + 16 * 64 * 18
    assert sizes["factored", 4] == codes + 16 * (64 * 4 + 4 * 18) and sizes["factored", 18] == codes + 16 * (64 * 18 + 18 * 18)
    assert sizes["smaller", 4] == sizes["factored", 4] and sizes["smaller", 18] == sizes["merged", 18]


@pytest.mark.parametrize("fields", [{}, {"storage": "factored", "assignments": "soft"}, {"share": None}], ids=str)
@torch.no_grad()
def test_a_file_gives_the_same_model_back(tmp_path, fields):
    made, record = fewbits.train(conv_net(), Lr2vq(**FEW, **fields), batches())
    save_module(made, tmp_path / "model.safetensors")
    again, images = load_module(conv_net(1), tmp_path / "model.safetensors"), batches(5)[0][0]
    assert torch.equal(again(images), made(images))
    for (name, tensor), (other, read) in zip(made.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and tensor.dtype == read.dtype and torch.equal(tensor, read)
    assert record["results"]["bits"] == whole_bits(made) and record["kind"] == "train"
    assert (tmp_path / "model.safetensors").stat().st_size * 8 > whole_bits(made)


# Training


def test_all_is_repeated_by_the_seed_and_the_last_weights_are_those_stored():
    made = [train_stages(conv_net(), Lr2vq(**FEW, assignments=one), batches())[0] for one in ("fixed", "fixed", "soft")]
    states = [model.state_dict() for model in made]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


@torch.no_grad()
def test_statistics_of_normalizations_are_those_of_the_stored_weights():
    made, _ = train_stages(conv_net(), Lr2vq(**FEW | {"norm_steps": 3}), batches())
    made[1].train()  # it saw every batch with that batch's own statistics
    hidden = [made[:4](images) for images, _ in batches()]
    torch.testing.assert_close(made[4].running_mean, torch.stack([one.mean((0, 2, 3)) for one in hidden]).mean(0))
    torch.testing.assert_close(made[4].running_var, torch.stack([one.transpose(0, 1).flatten(1).var(1) for one in hidden]).mean(0))


def test_soft_codes_start_between_centroids_and_end_at_the_nearest():
    soft, hard = (clustered(nn.Conv2d(8, 64, 3), share=0.5, entries=16, assignments=one) for one in ("soft", "fixed"))
    assert soft.vectors.requires_grad and not hard.vectors.requires_grad
    far = []
    for soft.progress in (0.0, 0.5, 1.0):
        far.append(float((soft.matrix() - soft._merged()[soft.codes].view(64, -1)).detach().norm()))
    assert far[0] > 2 * far[1] > 4 * far[2]
    soft.matrix().square().sum().backward()
    assert soft.vectors.grad.any() and soft.codebook.grad.any() and soft.decoder.grad.any()
    with torch.no_grad():
        soft.vectors[0] = soft.codebook[7]
    soft.harden()
    assert soft.codes[0] == 7 and torch.equal(soft.codes, nearest(soft.vectors, soft.codebook)[0])


# Without training


@pytest.fixture(scope="module")
def synthetic():
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(512, 512, generator=generator)
    return subvectors(weight + 0.004 * torch.randn(512, 16, generator=generator) @ torch.randn(16, 512, generator=generator), 16)


@pytest.mark.slow
def test_without_training_no_dimension_below_the_whole_is_best(synthetic):
    expected = {2: (0.858, 0.001), 4: (0.724, 0.025), 8: (0.468, 0.159), 12: (0.227, 0.341), 16: (0.0, 0.534)}
    found = {dimension: split_error(synthetic, dimension, 256) for dimension in expected}
    for dimension, errors in expected.items():
        assert found[dimension] == pytest.approx(errors, abs=0.01)
    lost, clustered_away = zip(*found.values(), strict=True)
    assert sorted(lost, reverse=True) == list(lost) and sorted(clustered_away) == list(clustered_away)
    totals = [sum(errors) for errors in found.values()]
    assert sorted(totals, reverse=True) == totals  # the whole dimension is the best


def test_both_errors_add_up_and_the_chosen_dimension_balances_them(synthetic):
    part = synthetic[:2048]
    dimension = Lr2vq(share=None).dimension(part, 32)
    below, at = (split_error(part, one, 32) for one in (dimension - 1, dimension))
    assert 1 < dimension < 16 and at[0] <= at[1] and below[0] > below[1]
    short, decoder = split(part, dimension)
    centroids, codes = cluster_vectors(short, 32)
    missed = (part - centroids[codes] @ decoder).square().sum() / part.square().sum()
    assert float(missed) == pytest.approx(sum(at), abs=1e-4)


# Bad input


def test_wrong_values_are_named():
    for fields in (
        {"share": 0.0},
        {"share": 1.5},
        {"entries": 1},
        {"kernels": 0},
        {"least": -1},
        {"assignments": "hard"},
        {"storage": "zip"},
    ):
        with pytest.raises(InputError, match=next(iter(fields))):
            Lr2vq(**fields)


def test_a_model_without_large_layers_is_refused():
    with pytest.raises(InputError, match=r"3 \(fewer than 100000 weights\)"):
        Lr2vq(least=100000).prepare(conv_net())
    with pytest.raises(InputError, match="no convolution or linear layer"):
        Lr2vq().prepare(nn.Sequential(nn.ReLU()))
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 100))
    prepared = Lr2vq(least=1).prepare(model)
    stage = next(Lr2vq(least=1).stages(prepared))
    assert stage.notes["kept"] == {"0": "first convolution", "1": "rows shorter than 18"}


# Trained digits


@pytest.fixture(scope="module")
def bench():
    pytest.importorskip("sklearn", reason="scikit-learn is not there")
    return runpy.run_path(str(ROOT / "benchmarks" / "lr2vq_digits.py"))


@pytest.mark.slow
def test_clustering_in_fewer_dimensions_beats_plain_vector_quantization_and_every_part_is_needed(bench):
    """Test losses of rows of the benchmark, from one trained network, at equal steps."""
    training, test = bench["digits"]()
    dense = bench["trained"](training)

    def measured(name):
        made, _ = bench["compressed"](dense, training, **bench["ROWS"][name])
        return bench["accuracy"](made, test)[1], whole_bits(made)

    (plain, bits), (short, same) = measured("plain VQ"), measured("d = 4")
    assert short < 0.96 * plain and same == bits
    for name, ratio in (
        ("d = 9", 0.99),
        ("d = 1", 0.95),
        ("d = 4, no low-rank training", 0.95),
        ("d = 4, decoder frozen", 0.97),
        ("d = 4, random codebook", 0.95),
    ):
        assert short < ratio * measured(name)[0], name
