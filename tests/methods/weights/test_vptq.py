import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.core.tensor import from_stored
from fewbits.formats.additive import Additive
from fewbits.formats.ranges import fit_uniform, round_codes
from fewbits.layers.linear import CompressedLinear
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.vptq import Vptq, _Range
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import compress_model
from fewbits.solvers.error_feedback import error_feedback, factorize
from fewbits.solvers.vector_kmeans import cluster_vectors, nearest
from fewbits.statistics.hessian import Hessian

sys.path.insert(0, str(Path(__file__).parent))
from layer_problem import heavy_layer
from real_layers import real_layers

ONE_SHOT = Vptq(steps=0)


def spiked_layer(seed=0, size=256):
    """Weights with a low-rank part; inputs of a falling spectrum, of which eight channels are ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(size, size, generator=generator)
    weight += 0.004 * torch.randn(size, 16, generator=generator) @ torch.randn(16, size, generator=generator)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    inputs = torch.randn(2048, size, generator=generator) * torch.exp(-3 * torch.linspace(0, 1, size)) @ basis.T
    inputs[:, torch.randperm(size, generator=generator)[:8]] *= 10
    hessian = Hessian(size)
    hessian.update(inputs)
    return weight, Statistics(hessian, tokens=2048)


def made(method, weight, statistics):
    return method.begin(weight, None, statistics).finish().weight


def proxy(weight, decoded, statistics):
    hessian = statistics[Hessian].matrix.double()
    energy = [float(((one.double() @ hessian) * one.double()).sum()) for one in (weight - decoded, weight)]
    return energy[0] / energy[1]


def by_rows(weight, statistics, strength, entries=256):
    """Plain k-means of the same vectors, without feedback."""
    vectors = weight.T.reshape(-1, 4)
    weights = None if strength is None else strength[:, None].expand(-1, weight.shape[0] // 4).flatten()
    centroids, _ = cluster_vectors(vectors, entries, weights=weights)
    return centroids[nearest(vectors, centroids)[0]].reshape(weight.T.shape).T


def test_each_part_helps_in_the_order_of_the_papers():
    weight, statistics = spiked_layer()
    strength = statistics[Hessian].matrix.diagonal()
    lost = {
        "k-means": by_rows(weight, statistics, None),
        "weighted k-means": by_rows(weight, statistics, strength),
        "feedback, plain k-means": made(replace(ONE_SHOT, without="weights"), weight, statistics).decode(),
        "no order": made(replace(ONE_SHOT, without="order"), weight, statistics).decode(),
        "whole": made(ONE_SHOT, weight, statistics).decode(),
        "gptq": Gptq(bits=2, group_size=None).compress(weight, statistics).decode(),
        "residual": made(replace(ONE_SHOT, residual_entries=16), weight, statistics).decode(),
        "gptq 3": Gptq(bits=3, group_size=None).compress(weight, statistics).decode(),
    }
    lost = {name: proxy(weight, one, statistics) for name, one in lost.items()}
    print(lost)
    assert lost["k-means"] > lost["weighted k-means"] > lost["feedback, plain k-means"] > lost["whole"]
    assert lost["whole"] < 0.85 * lost["no order"] and lost["whole"] < 0.6 * lost["gptq"]
    assert lost["residual"] < min(0.6 * lost["whole"], lost["gptq 3"])


@pytest.mark.slow
def test_each_part_helps_in_the_layers_of_a_real_model():
    layers, wins = real_layers((2,)), []
    for weight, inputs, _ in layers.values():
        hessian = Hessian(weight.shape[1])
        hessian.update(inputs)
        statistics = Statistics(hessian, tokens=len(inputs))
        strength = hessian.matrix.diagonal()
        few = replace(ONE_SHOT, entries=64)
        plain, weighted = (proxy(weight, by_rows(weight, statistics, one, 64), statistics) for one in (None, strength))
        whole, unordered = (
            proxy(weight, made(replace(few, without=part), weight, statistics).decode(), statistics) for part in ("nothing", "order")
        )
        wins.append((weighted < plain, whole < 0.8 * weighted, whole < unordered))
    shares = torch.tensor(wins).float().mean(0)
    # Feedback and order help everywhere, weights in k-means all but where a layer's inputs are much alike.
    assert len(layers) == 7 and float(shares[0]) > 0.8 and bool((shares[1:] == 1).all()), shares


def test_the_bits_of_the_papers_example():
    """4096 x 4096 in vectors of 8 with 256 centroids: 1.002 bits a weight with the codebook (section 4.1)."""
    stored = Additive.from_codes(torch.zeros(4096, 512, 1, dtype=torch.int64), torch.zeros(1, 256, 8).half(), columns=4096)
    assert sum(stored.bits().values()) / 4096**2 == pytest.approx(1.002, abs=5e-4)


def test_no_more_different_vectors_than_centroids_lose_nothing():
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(30, 4, generator=generator).half().float()
    columns = few[torch.randint(30, (64, 24), generator=generator)]  # [inputs, vectors, 4]
    weight = columns.flatten(1).T.contiguous()
    hessian = Hessian(64)
    hessian.update(torch.randn(300, 64, generator=generator))
    assert torch.equal(made(Vptq(steps=0, entries=32), weight, Statistics(hessian, tokens=300)).decode(), weight)


def test_numbers_on_a_fixed_grid_are_gptq():
    weight, statistics, _ = heavy_layer()
    scale, zero = fit_uniform(weight.reshape(1, -1), 3)
    factor = factorize(statistics[Hessian].matrix)
    grid = ((torch.arange(8.0) - zero) * scale).reshape(-1, 1)
    one = _Range(range(256), 1, torch.zeros(256, 128, 1, dtype=torch.int64))
    one.codebooks.append(grid)
    ours, _ = error_feedback(weight, factor, lambda j, column, _: one.encode(j, column))
    gptq, _ = error_feedback(weight, factor, lambda j, column, _: ((round_codes(column, scale, zero, 3) - zero) * scale).flatten())
    assert float((ours != gptq).float().mean()) < 1e-3  # a value in the middle of two levels may go either way


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vector": 3},
        {"residual_entries": 16},
        {"outlier_share": 0.02, "column_groups": 3, "outlier_entries": 32, "residual_entries": 8},
        {"normalize": "rescaled"},
        {"normalize": "rescaled", "column_groups": 2},
    ],
)
def test_what_is_stored_is_what_was_trained_and_takes_the_bits_it_says(options):
    weight, statistics, heldout = heavy_layer()
    learned = replace(ONE_SHOT, **options).begin(weight, None, statistics)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.add_(0.001 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    stored = learned.finish()
    torch.testing.assert_close(stored.weight.decode(), learned.weight().detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(from_stored(stored.settings(), stored.tensors()).weight.decode(), stored.weight.decode())
    torch.testing.assert_close(stored.weight.matmul(heldout), heldout @ stored.weight.decode().T, rtol=1e-3, atol=1e-3)
    bits = stored.bits()
    books = sum(value for name, value in bits.items() if name.endswith("codebooks"))
    codes = sum(value for name, value in bits.items() if name.endswith("codes"))
    unit = options.get("vector", 4)
    if not options or options == {"vector": 3}:
        groups = -(-128 // unit)
        assert codes == 256 * groups * 8 and books == 16 * unit * 256 and sum(bits.values()) == codes + books
    if "column_groups" not in options:
        assert not stored.weight.input_transforms  # one codebook needs no order of the columns
    if "normalize" in options:
        assert sum(value for name, value in bits.items() if name.endswith(("scale", "offsets"))) == 256 * 32


def test_normalized_columns_need_their_scale_in_the_hessian():
    weight, statistics = spiked_layer()
    weight = weight * torch.exp(torch.randn(256, generator=torch.Generator().manual_seed(1)))
    lost = {
        name: proxy(weight, made(replace(ONE_SHOT, normalize=name), weight, statistics).decode(), statistics)
        for name in ("none", "rescaled", "official")
    }
    assert lost["rescaled"] < 0.6 * lost["none"] and lost["rescaled"] < 0.6 * lost["official"]


def test_outliers_with_a_codebook_of_their_own_help():
    weight, statistics = spiked_layer()
    method = replace(ONE_SHOT, entries=64)
    few = proxy(weight, made(replace(method, outlier_share=0.05, outlier_vector=2), weight, statistics).decode(), statistics)
    assert few < 0.6 * proxy(weight, made(method, weight, statistics).decode(), statistics)


def test_training_lowers_the_distance_and_no_index_moves(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).save_pretrained(tmp_path / "model")
    source = open_model(tmp_path / "model")
    windows = torch.randint(64, (16, 32), generator=torch.Generator().manual_seed(0))
    dense, lost, codes = source.load(), {}, {}
    method = Vptq(entries=32, norm_rate=0.0, rate=1e-3)
    for steps in (0, 100):
        summary = compress_model(source, Plan(replace(method, steps=steps)), windows[:8], tmp_path / str(steps))
        ours = source.load()
        for name, stored in summary.layers():
            ours.set_submodule(name, CompressedLinear(stored))
        codes[steps] = {
            n: t for name, stored in summary.layers() if ".0." in name for n, t in stored.tensors().items() if n.endswith("codes")
        }
        with torch.no_grad():
            lost[steps] = float((ours.model(windows[8:]).last_hidden_state - dense.model(windows[8:]).last_hidden_state).square().mean())
    assert lost[100] < 0.9 * lost[0]
    assert codes[0] and all(torch.equal(kept, codes[100][name]) for name, kept in codes[0].items())


def test_values_out_of_range_are_named():
    for values, says in [({"vector": 0}, "vector=0"), ({"entries": 1}, "entries=1"), ({"normalize": "on"}, "normalize='on'")]:
        with pytest.raises(InputError, match=says):
            Vptq(**values)


@pytest.mark.slow
def test_on_the_first_blocks_of_the_real_model_it_loses_far_less_than_gptq(first_blocks, tmp_path):
    calibration, heldout = fewbits.TextSample(count=12, length=64), fewbits.TextSample("builtin:heldout", 16, 64)
    found, bits = {}, {}
    for name, method in {"gptq": Gptq(bits=2, group_size=64), "vptq": ONE_SHOT}.items():
        bits[name] = fewbits.compress(first_blocks, method, tmp_path / name, calibration=calibration, probe=None)["results"][
            "bits_per_weight"
        ]
        found[name] = fewbits.evaluate(tmp_path / name, reference=first_blocks, text=heldout)["results"]["kl_mean"]
    assert bits["vptq"] < bits["gptq"] and found["vptq"] < 0.7 * found["gptq"]
