from dataclasses import replace

import pytest
import torch

from fewbits.core.errors import InputError
from fewbits.layers.linear import CompressedLinear
from fewbits.methods.weights.aqlm import Aqlm
from fewbits.methods.weights.pv_tuning import PvTuning
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import StreamOptions, compress_model

WINDOWS = torch.randint(64, (24, 32), generator=torch.Generator().manual_seed(0))
METHOD = PvTuning(books=2, book_bits=4, steps=0, tune_steps=120, tune_rate=1e-3, norm_rate=0.0)


def model_of(learned, summary):
    ours = open_model(learned).load()
    for name, stored in summary.layers():
        ours.set_submodule(name, CompressedLinear(stored))
    for name, value in summary.replaced().items():
        ours.get_parameter(name).data.copy_(value)
    return ours


def divergence(learned, summary):
    with torch.no_grad():
        dense, ours = (
            torch.log_softmax(one(input_ids=WINDOWS).logits, -1) for one in (open_model(learned).load(), model_of(learned, summary))
        )
    return float((dense.exp() * (dense - ours)).sum(-1).mean())


@pytest.fixture(scope="module")
def tuned(learned, tmp_path_factory):
    """Summaries and divergences of the ways to tune, from one start."""
    found = {}
    for name, method in {
        "aqlm": Aqlm(books=2, book_bits=4, steps=0, norm_rate=0.0),
        "none": replace(METHOD, codes="none"),
        "subspace": METHOD,
        "all": replace(METHOD, codes="all", code_rate=1e-2),
        "zero": replace(METHOD, share=0.0),
    }.items():
        summary = compress_model(open_model(learned), Plan(method), WINDOWS, tmp_path_factory.mktemp(name) / "work")
        found[name] = (summary, divergence(learned, summary))
    return found


def codes(summary):
    return {name: stored.weight.terms[0].unpacked_codes() for name, stored in summary.layers()}


def test_tuning_beats_calibration_and_moving_codes_beats_codebooks_alone(tuned):
    lost = {name: value for name, (_, value) in tuned.items()}
    print(lost)
    assert lost["none"] < 0.9 * lost["aqlm"] and lost["subspace"] < 0.9 * lost["none"]
    assert lost["subspace"] < lost["all"]  # at the rates that are best for each of the two


def test_codes_move_in_the_subspace_alone(tuned):
    start, none, subspace, everything = (codes(tuned[name][0]) for name in ("aqlm", "none", "subspace", "all"))
    moved = {
        name: [float((one[layer] != start[layer]).any(-1).float().mean()) for layer in start]
        for name, one in {"none": none, "subspace": subspace, "all": everything}.items()
    }
    assert max(moved["none"]) == 0 and max(moved["subspace"]) > 0
    assert max(moved["all"]) > 0


def test_a_share_of_nothing_is_tuning_of_codebooks_alone(tuned):
    first, second = (dict(tuned[name][0].layers()) for name in ("none", "zero"))
    for name, stored in first.items():
        assert all(torch.equal(tensor, second[name].tensors()[key]) for key, tensor in stored.tensors().items())


def test_norms_are_tuned_and_stored_and_a_stopped_run_ends_in_the_same_bytes(learned, tmp_path):
    plan = Plan(replace(METHOD, tune_steps=5, steps=3, norm_rate=1e-3))
    whole = compress_model(open_model(learned), plan, WINDOWS, tmp_path / "whole")
    assert "model.norm.weight" in whole.replaced() and len(whole.replaced()) == 5

    def stop(block, blocks, text, error, left):
        if text.startswith("tuning, step 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(open_model(learned), plan, WINDOWS, tmp_path / "stopped", StreamOptions(progress=stop))
    compress_model(open_model(learned), plan, WINDOWS, tmp_path / "stopped")
    for path in sorted((tmp_path / "whole").glob("block-*")):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()


def test_values_out_of_range_are_named():
    for values, says in [({"codes": "some"}, "codes='some'"), ({"share": 2.0}, "share=2"), ({"books": 0}, "books=0")]:
        with pytest.raises(InputError, match=says):
            PvTuning(**values)
