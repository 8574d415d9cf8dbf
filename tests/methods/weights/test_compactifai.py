from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.method import Profile, Statistics
from fewbits.formats.dense import Dense
from fewbits.formats.tensor_train import TensorTrain
from fewbits.layers.learned_tensor_train import RoundedTrain
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.methods.weights.compactifai import Compactifai
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.profile import loss_rises
from fewbits.pipeline.stream import StreamOptions, compress_model
from fewbits.solvers.tensor_train import parameters

WINDOWS = torch.randint(64, (24, 32), generator=torch.Generator().manual_seed(0))
CUT = Compactifai(tune_steps=0)
HEALED = Compactifai(tune_steps=40, tune_rate=5e-3)


def loss(learned, summary=None):
    model = open_model(learned).load()
    for name, stored in [] if summary is None else summary.layers():
        model.set_submodule(name, CompressedLinear(stored))
    for name, value in {} if summary is None else summary.replaced().items():
        model.get_parameter(name).data.copy_(value)
    with torch.no_grad():
        return float(model(input_ids=WINDOWS, labels=WINDOWS).loss)


def run(learned, work, method, keep=(), **options):
    return compress_model(open_model(learned), Plan(method, keep), WINDOWS, work, StreamOptions(**options) if options else None)


@pytest.fixture(scope="module")
def made(learned, tmp_path_factory):
    """Summaries and losses of one cut, healed in several ways."""
    found = {}
    for name, method in {
        "cut": CUT,
        "healed": HEALED,
        "random": replace(HEALED, start="random"),
        "distilled": replace(HEALED, distill=True),
        "cores alone": replace(HEALED, norm_rate=0.0),
        "8 bits": replace(HEALED, core_bits=8),
        "4 bits": replace(HEALED, core_bits=4, group_size=16),
        "4 bits, cut": replace(CUT, core_bits=4, group_size=16),
    }.items():
        summary = run(learned, tmp_path_factory.mktemp(name) / "work", method, ("*self_attn*",))
        found[name] = (summary, loss(learned, summary))
    return found


def test_healing_recovers_most_of_the_loss_and_the_cut_is_a_better_start_than_chance(learned, made):
    lost = {name: value for name, (_, value) in made.items()}
    dense = loss(learned)
    print(dense, lost)
    recovered = {name: (lost["cut"] - value) / (lost["cut"] - dense) for name, value in lost.items()}
    assert lost["cut"] > dense + 0.1
    assert recovered["healed"] > 0.7 and recovered["distilled"] > 0.7 and recovered["cores alone"] > 0.5
    assert lost["healed"] < lost["random"]


def test_cores_are_rounded_while_they_are_healed(made):
    lost = {name: value for name, (_, value) in made.items()}
    assert abs(lost["8 bits"] - lost["healed"]) < 0.05
    assert lost["healed"] < lost["4 bits"] < lost["4 bits, cut"]
    bits = {name: summary.record()["bits_per_weight"] for name, (summary, _) in made.items()}
    assert bits["healed"] == bits["cut"] <= 8 and bits["4 bits"] < 0.4 * bits["healed"]


def test_only_what_is_not_kept_is_cut_and_norms_are_trained(made):
    summary, _ = made["healed"]
    layers = dict(summary.layers())
    assert len(layers) == 6 and all(".mlp." in name for name in layers)
    assert len(summary.replaced()) == 5 and not made["cores alone"][0].replaced()
    for stored in layers.values():
        (term,) = stored.weight.terms
        rows, columns = term.shape
        legs = (term.outputs, term.inputs)
        assert sum(stored.bits().values()) == 16 * parameters(legs, term.bonds[1]) <= 8 * rows * columns
        assert parameters(legs, term.bonds[1] + 1) > rows * columns / 2


def test_a_run_stopped_while_it_heals_or_profiles_ends_in_the_same_bytes(learned, tmp_path):
    method = Compactifai(tune_steps=3, profile="block", profile_windows=4, core_bits=6, sites=3, order="norm")
    run(learned, tmp_path / "whole", method)
    for number, at in enumerate(("profile, step 2", "tuning, step 2")):

        def stop(block, blocks, text, error, left, at=at):
            if text.startswith(at):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(learned, tmp_path / str(number), method, progress=stop)
        run(learned, tmp_path / str(number), method)
        for path in sorted((tmp_path / "whole").glob("block-*")):
            assert path.read_bytes() == (tmp_path / str(number) / path.name).read_bytes()


def test_a_rise_is_the_loss_with_one_unit_cut_less_the_dense_loss(learned, tmp_path):
    source = open_model(learned)
    names = [f"model.layers.{block}.{layer}" for block in range(2) for layer in ("mlp.up_proj", "mlp.down_proj")]
    dense = loss(learned)
    for unit, together in [("layer", "*.1.mlp.up_proj"), ("block", "*.1.*"), ("type", "*.up_proj")]:
        rises = loss_rises(source, dict.fromkeys(names, CUT), Profile(unit, 24), WINDOWS)
        model = source.load()
        cut = [name for name in names if fnmatchcase(name, together)]
        with torch.no_grad():
            for name in cut:
                linear = model.get_submodule(name)
                linear.weight.copy_(CUT.compress(linear.weight.float(), Statistics()).decode())
            rise = float(model(input_ids=WINDOWS, labels=WINDOWS).loss) - dense
        assert float(rises["model.layers.1.mlp.up_proj"]) * len(cut) == pytest.approx(rise, abs=1e-5)


def test_a_profile_gives_more_to_layers_whose_cuts_cost_more():
    generator = torch.Generator().manual_seed(1)
    layers = [(f"model.layers.{n}.up", torch.randn(64, 64, generator=generator)) for n in range(4)]
    method = replace(CUT, profile="layer")

    def bonds(rises):
        given = (
            (name, weight, Statistics(sensitivities={name: torch.tensor(rise)})) for (name, weight), rise in zip(layers, rises, strict=True)
        )
        return [int(bond) for bond in method.plan(given).values()]

    def spent(found):
        return sum(64 * 64 if bond == 0 else parameters(((8, 8), (8, 8)), bond) for bond in found)

    even, uneven = bonds([0.1] * 4), bonds([1.0, 0.1, 0.1, 0.01])
    assert max(even) - min(even) <= 4 and spent(even) <= 0.5 * 4 * 64 * 64 and spent(uneven) <= 0.5 * 4 * 64 * 64
    assert uneven[0] == 0 or uneven[0] > max(uneven[1:])
    assert uneven[3] == min(bond for bond in uneven if bond) and bonds([1.0, -0.1, -0.2, 0.0])[0] in (0, 28)
    assert CUT.plan(iter(layers)) == {}  # type: ignore[arg-type]


def test_a_layer_that_the_profile_leaves_whole_is_stored_as_it_is_and_healed_too(learned, tmp_path):
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    whole = CUT.compress(weight, Statistics(choices={"layer": torch.tensor(0)}))
    assert isinstance(whole.terms[0], Dense) and torch.equal(whole.decode(), weight.half().float())
    summary = run(learned, tmp_path / "work", Compactifai(profile="layer", profile_windows=4, share=0.75, tune_steps=2))
    record = summary.record()
    assert record["bits_per_weight"] <= 12 and all("loss_rise" in layer for layer in record["layers"].values())
    assert len({term.bonds[1] for _, stored in summary.layers() if isinstance(term := stored.weight.terms[0], TensorTrain)}) > 2


def test_the_learned_layer_is_what_will_be_stored_and_its_grids_follow_it():
    weight = torch.randn(24, 36, generator=torch.Generator().manual_seed(0))
    method = Compactifai(core_bits=8, group_size=8, sites=3, order="norm")
    tensor = method.compress(weight, Statistics())
    learned = RoundedTrain(StoredLinear(tensor), None, 1e-2)
    assert float((learned.weight().detach() - tensor.decode()).norm() / tensor.decode().norm()) < 0.01
    with torch.no_grad():
        learned.cores[1].mul_(3.0)
    torch.testing.assert_close(learned.weight().detach(), 3 * tensor.decode(), rtol=0.05, atol=0.05)
    upstream = torch.randn(24, 36, generator=torch.Generator().manual_seed(1))
    (learned.weight() * upstream).sum().backward()
    assert all(float(core.grad.abs().sum()) > 0 for core in learned.cores)
    stored = learned.finish()
    assert torch.equal(stored.weight.decode(), learned.weight().detach())
    assert stored.weight.settings() == tensor.settings()


def test_legs_and_the_share_to_discard_are_fields():
    weight = torch.randn(48, 36, generator=torch.Generator().manual_seed(0))
    term = replace(CUT, legs="48=2x24").compress(weight, Statistics()).terms[0]
    assert (term.outputs, term.inputs) == ((2, 24), (6, 6))
    for sites in (2, 3, 4):
        term = replace(CUT, sites=sites, discard=0.2).compress(weight, Statistics()).terms[0]
        assert len(term.cores) == sites
        assert float((weight - term.decode()).square().sum()) <= 0.201 * float(weight.square().sum())


def test_sorting_rows_and_columns_by_norm_helps_where_norms_differ_and_is_undone():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator)
    inputs = torch.randn(5, 64, generator=generator)
    uneven = weight * torch.randn(96, 1, generator=generator).exp() * torch.randn(64, generator=generator).exp()
    whole = replace(CUT, share=1.0, order="norm", discard=0.0).compress(uneven, Statistics())
    torch.testing.assert_close(whole.matmul(inputs), inputs @ uneven.T, rtol=1e-2, atol=0.1)
    lost = {
        order: float((uneven - replace(CUT, order=order).compress(uneven, Statistics()).decode()).norm()) for order in ("identity", "norm")
    }
    assert lost["norm"] < 0.9 * lost["identity"]
    bits = [sum(replace(CUT, order=order).compress(uneven, Statistics()).bits().values()) for order in ("identity", "norm")]
    assert bits[1] - bits[0] == 16 * (96 + 64)


def test_recipes_and_values_that_do_not_fit_are_named(learned, tmp_path):
    with pytest.raises(InputError, match="compactifai trains the whole model at last; a recipe without overrides"):
        compress_model(open_model(learned), Plan(HEALED, overrides=(("*.o_proj", Rtn()),)), WINDOWS, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    summary = compress_model(open_model(learned), Plan(CUT, overrides=(("*.o_proj", replace(CUT, sites=3)),)), WINDOWS, tmp_path / "b")
    assert {len(stored.weight.terms[0].cores) for _, stored in summary.layers()} == {2, 3}
    for values, says in [
        ({"share": 0.0}, "share=0.0"),
        ({"sites": 5}, "sites=5"),
        ({"legs": "48=6*8"}, "legs='48=6\\*8' cannot be read"),
        ({"legs": "48=6x9"}, "2 factors whose product is 48"),
        ({"core_bits": 1}, "core_bits=1"),
        ({"start": "zero"}, "start='zero'"),
        ({"order": "size"}, "order='size'"),
        ({"profile": "head"}, "profile='head'"),
        ({"discard": 0.1, "profile": "block"}, "discard=0.1 fixes"),
    ]:
        with pytest.raises(InputError, match=says):
            Compactifai(**values)


@pytest.mark.slow
def test_on_the_real_model_a_short_healing_recovers_most(tmp_path):
    """MLPs at half of their parameters; the cut itself reads no text."""
    heldout, lost = fewbits.TextSample("builtin:heldout", 8, 128), {}
    for name, method, count in [("cut", CUT, 2), ("healed", Compactifai(tune_steps=40, batch_size=2), 80)]:
        text, plan = fewbits.TextSample(count=count, length=128), Plan(method, ("*self_attn*",))
        fewbits.compress("builtin:tiny-lm", plan, tmp_path / name, calibration=text, probe=None)
        lost[name] = fewbits.evaluate(tmp_path / name, reference="builtin:tiny-lm", text=heldout)["results"]["delta_loss"]
    assert lost["healed"] < 0.5 * lost["cut"]
