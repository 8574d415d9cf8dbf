import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits import caches
from fewbits.core.errors import InputError
from fewbits.core.method import Statistics
from fewbits.core.tensor import CompressedTensor, from_stored
from fewbits.evaluation.fidelity import compare_logits, score, summarize
from fewbits.formats.dense import Dense
from fewbits.formats.front import Front
from fewbits.layers.block_activation import BlockQuantizer
from fewbits.layers.block_product import block_product
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.methods.activations.comet import Comet, outlier_channels
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.hf_cache import cache_keyword
from fewbits.models.source import open_model
from fewbits.pipeline.inject import inject_outliers
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import compress_model
from fewbits.statistics.ranges import Ranges
from fewbits.statistics.sample import Sample

sys.path.insert(0, str(Path(__file__).parent))
from outlier_layer import gathered, outlier_layer


def made(method, weight, statistics):
    tensor = method.compress(weight, statistics)
    return StoredLinear(tensor, method.activation(statistics, tensor))


def error(method, problem):
    weight, statistics, heldout, *_ = problem
    outputs = CompressedLinear(made(method, weight, statistics))(heldout)
    return float((outputs - heldout @ weight.T).square().sum() / (heldout @ weight.T).square().sum())


def test_outliers_are_those_above_six_medians_largest_first():
    magnitudes = torch.tensor([1.0, 7.0, 2.0, 0.0, 1.0, 9.0, 6.0, 1.0, 9.0, 0.0])
    # of the channels that were ever anything but zero the median is 2; 9 and 9 stay in their order
    assert outlier_channels(magnitudes, 3.0).tolist() == [5, 8, 1]
    assert outlier_channels(magnitudes, 2.9).tolist() == [5, 8, 1, 6]
    assert outlier_channels(magnitudes, 4.5).tolist() == [] and outlier_channels(torch.zeros(3), 6.0).tolist() == []


@pytest.mark.parametrize("weights", ["rtn", "gptq"])
def test_what_is_stored_is_the_methods_own_result_for_permuted_inputs_and_columns(weights):
    """Outlier channels are found and come first; groups are the blocks of permuted columns."""
    weight, statistics, _, inputs, large = outlier_layer()
    stored = made(Comet(block_size=16, weights=weights), weight, statistics)
    front, term = stored.weight.input_transforms[0], stored.weight.terms[0]
    assert front.first.sort().values.tolist() == large.tolist()
    falling = inputs.abs().amax(0)[front.first.long()]
    assert bool((falling[:-1] >= falling[1:]).all())
    order = torch.tensor([*front.first.tolist(), *(channel for channel in range(128) if channel not in large.tolist())])
    method = (Rtn if weights == "rtn" else Gptq)(bits=4, group_size=16, symmetric=True)
    expected = method.compress(weight[:, order], gathered(inputs[:, order])).terms[0]
    # the sums of the Hessian are added up in another order, which may turn a few codes over
    assert float((term.unpacked_codes() != expected.unpacked_codes()).float().mean()) < (1e-9 if weights == "rtn" else 0.01)
    torch.testing.assert_close(term.scales, expected.scales, rtol=0.05 if weights == "gptq" else 0, atol=0)
    assert stored.activation.is_wide().tolist() == [True] + 7 * [False]
    again = from_stored(stored.settings(), stored.tensors())
    assert torch.equal(CompressedLinear(again)(inputs[:5]), CompressedLinear(stored)(inputs[:5]))


@pytest.mark.parametrize(("weights", "symmetric"), [("rtn", True), ("gptq:search=mse", True), ("awq", True), ("hqq", False)])
def test_any_method_that_rounds_weights_goes_behind_the_permutation(weights, symmetric):
    problem = outlier_layer()
    weight, statistics, heldout, *_ = problem
    method = Comet(block_size=16, weights=weights)
    assert error(method, problem) < 0.12
    if weights != "awq":  # which takes outliers out of the inputs by itself
        assert error(Comet(block_size=16, weights=weights, outlier_bits=4, permute=False), problem) > 0.2
    stored = made(method, weight, statistics)
    assert isinstance(stored.weight.input_transforms[0], Front) and (stored.weight.terms[0].zero_points is None) == symmetric
    if symmetric:  # the integer product serves them all, scales of the input included
        expected = CompressedLinear(stored)(heldout)
        found = block_product(stored.weight, stored.activation, heldout)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_bits_are_four_a_sixteenth_a_list_of_outliers_and_one_a_block():
    weight, statistics, *_ = outlier_layer(count=5)
    stored = made(Comet(block_size=16), weight, statistics)
    assert stored.bits() == {
        "weight.terms.0.codes": 4 * 64 * 128,
        "weight.terms.0.scales": 16 * 64 * 8,
        "weight.input_transforms.0.first": 16 * 5,
        "activation.wide": 8,
    }
    plain = made(Comet(block_size=16), *outlier_layer(count=0)[:2])
    assert plain.weight.input_transforms == () and not bool(plain.activation.is_wide().any())


def test_a_weight_rounded_before_it_is_permuted_loses_far_more():
    """Groups then mix small columns, which large inputs meet, with large ones."""
    problem = outlier_layer(count=16)
    weight, statistics, heldout, *_ = problem
    early = Rtn(bits=4, group_size=16, symmetric=True).compress(weight, statistics)
    quantizer = made(Comet(block_size=16), weight, statistics).activation
    front = Front.from_first(outlier_channels(statistics[Ranges].largest_magnitude, 6.0), 128)
    outputs = quantizer.apply(front.apply(heldout)) @ early.decode()[:, front.order()].T
    lost = float((outputs - heldout @ weight.T).square().sum() / (heldout @ weight.T).square().sum())
    assert error(Comet(block_size=16, weights="rtn"), problem) < 0.6 * lost


def test_width_belongs_to_whole_blocks():
    """Ordinary channels that share the outliers' block have 8 bits too; outliers beyond it make the next block wide."""
    weight, statistics, heldout, *_ = outlier_layer(count=19)
    stored = made(Comet(block_size=16), weight, statistics)
    assert stored.activation.is_wide().tolist() == [True, True] + 6 * [False]
    moved = stored.weight.input_transforms[0].apply(heldout)
    codes, _ = stored.activation.codes(moved)
    largest = codes.int().abs().view(-1, 8, 16).amax((0, 2)).tolist()
    assert largest == [127, 127] + 6 * [7]
    assert codes[:, 19:32].unique().numel() > 15  # ordinary channels on more levels than 4 bits have


@pytest.mark.parametrize(("features", "size", "count"), [(128, 8, 6), (100, 16, 9), (64, 64, 3), (96, 8, 30)])
def test_shares_of_wide_blocks_are_counted_exactly(features, size, count):
    generator, unpermuted = torch.Generator().manual_seed(0), []
    weight, blocks = torch.randn(4, features, generator=generator), -(-features // size)
    for _ in range(60):
        inputs = torch.rand(32, features, generator=generator) + 1
        large = torch.randperm(features, generator=generator)[:count]
        inputs[:, large] *= 50
        statistics = gathered(inputs)
        quantizers = [made(Comet(block_size=size, weights="rtn", permute=kind), weight, statistics).activation for kind in (True, False)]
        assert int(quantizers[0].is_wide().sum()) == math.ceil(count / size)
        assert quantizers[0].wide_share() == pytest.approx(min(1.0, math.ceil(count / size) * size / features))
        hit = sorted({channel // size for channel in large.tolist()})
        assert quantizers[1].is_wide().nonzero().flatten().tolist() == hit
        unpermuted.append(len(hit) / blocks)
    expected = 1 - (1 - size / features) ** count if features % size == 0 else None
    if expected is not None:
        assert sum(unpermuted) / 60 == pytest.approx(expected, abs=0.08)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mixed_is_near_eight_bits_and_far_from_four(seed):
    """With weights of 8 bits, so that what is lost is lost by the inputs."""
    problem = outlier_layer(seed, count=6)
    errors = {
        name: error(Comet(bits=8, block_size=16, weights="rtn", **fields), problem)
        for name, fields in {
            "eight": {"activation_bits": 8},
            "mixed": {},
            "unpermuted": {"permute": False},
            "four": {"outlier_bits": 4, "permute": False},
            "four, permuted": {"outlier_bits": 4},
        }.items()
    }
    assert errors["eight"] < errors["mixed"] < 0.4 * errors["four, permuted"]
    assert errors["four, permuted"] < 0.6 * errors["four"] and errors["mixed"] < 0.2 * errors["four"]


def test_the_least_outliers_that_keep_the_loss_within_the_tolerance():
    weight, statistics, *_ = outlier_layer(count=20)
    for tolerance in (0.0, 0.5, 2.0, 1e6):
        method = Comet(block_size=16, weights="rtn", tolerance=tolerance)
        chosen = len(method.outliers({"a": weight}, statistics))
        falling = statistics[Ranges].largest_magnitude.argsort(descending=True, stable=True)
        losses = []
        for count in range(0, 129, 16):  # by hand, over all counts of blocks
            order = torch.cat([falling[:count], falling[count:].sort().values])
            inputs = statistics[Sample].inputs[:, order]
            wide = torch.arange(8) < count // 16
            rounded = BlockQuantizer.from_blocks(wide, 128, 16).apply(inputs)
            matrix = Rtn(bits=4, group_size=16, symmetric=True).compress(weight[:, order], statistics).decode()
            losses.append(float((rounded @ matrix.T - inputs @ weight[:, order].T).square().sum()))
        fitting = [16 * number for number, loss in enumerate(losses) if loss <= (1 + tolerance) * losses[-1] * (1 + 1e-6)]
        assert chosen == fitting[0]
        stored = made(method, weight, statistics)
        assert int(stored.activation.is_wide().sum()) == chosen // 16
    assert chosen == 0
    assert 16 < len(Comet(block_size=16, weights="rtn", tolerance=2.0).outliers({"a": weight}, statistics)) < 128


def test_linears_of_one_input_share_the_order_and_other_inputs_have_their_own(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).eval()
    windows = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(0))
    factors = inject_outliers(model, windows, share=0.05)
    model.save_pretrained(tmp_path / "model")
    layers = dict(compress_model(open_model(tmp_path / "model"), Plan(Comet(block_size=8)), windows, tmp_path / "work").layers())
    orders = {
        name.rpartition(".")[2]: layer.weight.input_transforms[0].first for name, layer in layers.items() if layer.weight.input_transforms
    }
    assert torch.equal(orders["q_proj"], orders["k_proj"]) and torch.equal(orders["q_proj"], orders["v_proj"])
    assert torch.equal(orders["gate_proj"], orders["up_proj"])
    for layer, scale in zip(("q_proj", "gate_proj"), factors.values(), strict=True):
        assert orders[layer].sort().values.tolist() == (scale > 1).nonzero().flatten().tolist()
    assert "o_proj" not in orders  # nothing reaches out of its input


def test_a_channel_that_is_large_in_one_token_alone_is_marked_and_one_never_seen_hurts_its_own_token_alone():
    weight, _, heldout, inputs, _ = outlier_layer(count=0)
    inputs[0, 77] = 400.0  # as at the beginning of a text
    statistics = gathered(inputs)
    stored = made(Comet(block_size=16), weight, statistics)
    assert stored.weight.input_transforms[0].first.tolist() == [77]
    layer, quiet = CompressedLinear(stored), heldout.clone()
    heldout[3, 120] = 400.0  # not seen in calibration: a block of 4 bits
    found, expected = layer(heldout), heldout @ weight.T
    plain = layer(quiet)
    others = torch.arange(len(heldout)) != 3
    assert torch.equal(found[others], plain[others])
    codes, scales = stored.activation.codes(stored.weight.input_transforms[0].apply(heldout))
    assert scales[3].max() == torch.tensor(400 / 7).half().float() and int((codes[3].view(8, 16) != 0).sum(1).min()) == 1
    static = CompressedLinear(made(Comet(block_size=16, granularity="static"), weight, statistics))
    lost = [float((one(heldout)[3] - expected[3]).norm() / expected[3].norm()) for one in (layer, static)]
    assert lost[0] < 0.3 and lost[1] > 0.8  # a fixed scale cuts it off


def test_static_scales_reach_what_calibration_saw():
    problem = outlier_layer()
    weight, statistics, _, inputs, _ = problem
    stored = made(Comet(block_size=16, granularity="static"), weight, statistics)
    blocks = stored.weight.input_transforms[0].apply(inputs).abs().amax(0).view(8, 16).amax(1)
    most = torch.tensor([127.0] + 7 * [7.0])
    assert torch.equal(stored.activation.scales, (blocks / most).half()) and stored.bits()["activation.scales"] == 16 * 8
    dynamic, static = (error(Comet(block_size=16, granularity=kind), problem) for kind in ("token", "static"))
    assert dynamic < static < 6 * dynamic


def test_values_out_of_range_are_named():
    for values, says in [
        ({"block_size": 0}, "block_size=0"),
        ({"outlier_bits": 3}, "outlier_bits=3"),
        ({"activation_bits": 9}, "activation_bits=9"),
        ({"threshold": 0}, "threshold=0"),
        ({"tolerance": -1}, "tolerance=-1"),
        ({"tolerance": 1, "permute": False}, "permute=True"),
        ({"granularity": "row"}, "'row'"),
        ({"weights": "gptqq"}, "did you mean 'gptq'"),
        ({"weights": "kivi"}, "does not round single layers"),
        ({"weights": "comet"}, "does not round single layers"),
        ({"weights": "mixllm"}, "does not round single layers"),
        ({"weights": "svdquant"}, "does more than round"),
        ({"weights": "gptq:group_size=64"}, "group_size would be right as comet's own"),
        ({"weights": "gptq:dampin=1"}, "did you mean 'damping'"),
    ]:
        with pytest.raises(InputError, match=says):
            Comet(**values)
    weight, statistics, *_ = outlier_layer()
    with pytest.raises(InputError, match="moves channels to other blocks"):
        Comet(block_size=16, weights="gptq:activation_order=true").compress(weight, statistics)


class Injected:
    """The built-in model with outliers in what its norms give to linear layers, which leaves its predictions as they were."""

    def __init__(self):
        source = open_model("builtin:tiny-lm")
        self.dense, self.model = source.load(), source.load()
        tokenizer = source.tokenizer()
        self.calibration = fewbits.TextSample("builtin:calibration", 4, 96).windows(tokenizer)
        self.heldout = fewbits.TextSample("builtin:heldout", 4, 64).windows(tokenizer)
        inject_outliers(self.model, self.calibration[:1, :16])
        names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        self.readers = [one for name, one in self.model.named_modules() if name.endswith(names)]

    @torch.no_grad()
    def ranges(self):
        found = {reader: Ranges(256) for reader in self.readers}
        hooks = [one.register_forward_pre_hook(lambda m, given: found[m].update(given[0].flatten(0, 1))) for one in self.readers]
        self.model(input_ids=self.calibration)
        for hook in hooks:
            hook.remove()
        return found

    def perplexity(self, method, ranges):
        """Only the inputs behind norms are rounded; weights are exact. Also the mean share of wide blocks."""
        shares, hooks = [], []
        for reader in self.readers:
            statistics = Statistics(ranges[reader])
            front = Front.from_first(method.outliers({}, statistics) if method.permute else torch.empty(0), 256)
            tensor = CompressedTensor((Dense(reader.weight.detach()),), (front,) if front.first.numel() else ())
            quantizer = method.activation(statistics, tensor)
            shares.append(quantizer.wide_share())
            hooks.append(
                reader.register_forward_pre_hook(lambda m, given, f=front, q=quantizer: (f.inverse().apply(q.apply(f.apply(given[0]))),))
            )
        found = summarize(score(self.model, self.heldout, self.dense))
        for hook in hooks:
            hook.remove()
        return found["perplexity"], sum(shares) / len(shares), found["reference_perplexity"]


@pytest.fixture(scope="module")
def injected():
    return Injected()


@pytest.mark.slow
def test_on_a_real_model_the_permutation_cuts_the_share_of_wide_blocks_at_near_equal_perplexity(injected):
    ranges = injected.ranges()
    found = {
        name: injected.perplexity(Comet(block_size=16, **fields), ranges)
        for name, fields in {
            "eight": {"activation_bits": 8, "permute": False},
            "four": {"outlier_bits": 4, "permute": False},
            "four, permuted": {"outlier_bits": 4},
            "mixed, unpermuted": {"permute": False},
            "mixed": {},
        }.items()
    }
    dense = found["eight"][2]
    perplexity, share = ({name: one[part] for name, one in found.items()} for part in (0, 1))
    assert share["mixed"] == 1 / 16 and share["mixed, unpermuted"] > 0.35  # ten outliers of 256 at every norm, blocks of 16
    assert perplexity["eight"] < 1.03 * dense and perplexity["mixed"] < 1.12 * dense
    assert perplexity["mixed"] < 1.08 * perplexity["mixed, unpermuted"]
    assert perplexity["four"] > 2 * dense and perplexity["four, permuted"] > 1.1 * dense


@pytest.mark.slow
def test_with_keys_and_values_at_4_bits_mixed_is_near_eight_bits_and_far_from_four(injected, tmp_path):
    injected.model.save_pretrained(tmp_path / "model")
    source, losses = open_model(tmp_path / "model"), {}
    with torch.no_grad():
        dense = injected.dense(input_ids=injected.heldout, use_cache=False).logits[:, :-1]
        for name, fields in {"eight": {"activation_bits": 8}, "mixed": {}, "four": {"outlier_bits": 4, "permute": False}}.items():
            plan = Plan(Comet(block_size=16, weights="rtn", **fields))
            summary = compress_model(source, plan, injected.calibration[:2, :32], tmp_path / name)
            model = source.load()
            for layer, stored in summary.layers():
                model.set_submodule(layer, CompressedLinear(stored))
            cache = caches.open(model, "kivi", bits=4, group_size=16, residual=16, chunked=True)
            pieces = [
                model(input_ids=piece, use_cache=True, **{cache_keyword(model): cache}).logits for piece in injected.heldout.split(16, 1)
            ]
            assert cache.memory()["sealed_bits_per_element"] == pytest.approx(6.0)  # 4 and two fp16 for each 16
            kl = compare_logits(torch.cat(pieces, 1)[:, :-1], dense, injected.heldout[:, 1:])[2]
            losses[name] = float(kl[:, 16:].mean())
    assert losses["eight"] < losses["mixed"] < 3 * losses["eight"] and losses["four"] > 4 * losses["mixed"]


@pytest.mark.slow
def test_first_tokens_of_a_text_lose_no_more_than_others_where_each_token_has_its_scales(injected):
    """In what down projections read, channels are large in single tokens; fixed scales make the ordinary tokens pay for those."""
    seen, losses = {}, {"token": [], "static": []}
    readers = {name: one for name, one in injected.dense.named_modules() if name.endswith("down_proj")}
    hooks = [one.register_forward_pre_hook(lambda m, given, name=name: seen.__setitem__(name, given[0])) for name, one in readers.items()]
    with torch.no_grad():
        injected.dense(input_ids=injected.calibration)
        calibration = dict(seen)
        injected.dense(input_ids=injected.heldout)
    for hook in hooks:
        hook.remove()
    for name, reader in readers.items():
        ranges = Ranges(768)
        ranges.update(calibration[name].flatten(0, 1))
        for kind, found in losses.items():
            method = Comet(block_size=32, granularity=kind)
            front = Front.from_first(method.outliers({}, Statistics(ranges)), 768)
            weight = reader.weight.detach()[:, front.order()]
            quantizer = method.activation(Statistics(ranges), CompressedTensor((Dense(weight),), (front,)))
            moved = front.apply(seen[name])
            lost = ((quantizer.apply(moved) - moved) @ weight.T).square().sum(-1) / (moved @ weight.T).square().sum(-1)
            found.append((float(lost[:, 0].mean()), float(lost[:, 1:].mean())))
    assert all(first < 1.5 * rest for first, rest in losses["token"])
    assert all(static[1] > 4 * token[1] for token, static in zip(losses["token"], losses["static"], strict=True))
