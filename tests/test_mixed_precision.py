"""Allocation from end to end: budgets are kept in true bytes, recipes reproduce, stopped runs go on, and the check is fair."""

import json
from dataclasses import replace

import jsonschema
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.record import schema
from fewbits.data.text import load_text
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.rtn import Rtn
from fewbits.mixed_precision import Request, allocate, make_plan
from fewbits.models.source import open_model
from fewbits.pipeline.feed import StreamOptions
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.recipe import read_recipe

GRID = ("rtn:group_size=16",)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random model of three blocks with the built-in model's tokenizer."""
    path = tmp_path_factory.mktemp("small") / "model"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_hidden_layers=3, **sizes)).save_pretrained(path)
    open_model("builtin:tiny-lm").tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Short files: the built-in texts take seconds to tokenize."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("calibration", "heldout"):
        (folder / f"{name}.txt").write_text("\n".join(load_text(f"builtin:{name}"))[:30000])
    return {name: fewbits.TextSample(str(folder / f"{name}.txt"), 4, 32) for name in ("calibration", "heldout")}


def weights_file(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("solver", "kind"), [("ilp", "hessian"), ("greedy", "output"), ("ilp", "fisher"), ("ilp", "kl")])
def test_the_budget_is_kept_and_the_recipe_makes_the_same_file(small, tmp_path, texts, solver, kind):
    request = Request("4.6bpw", GRID, solver=solver, sensitivity=kind, tie=True)
    record = allocate(small, request, tmp_path / "out", **texts)
    results, made = record["results"], json.loads((tmp_path / "out" / "fewbits.json").read_text())["results"]
    assert results["bits"] == sum(made["bits"].values()) <= 4.6 * results["weights"] * (1 + 1e-12)
    assert results["bits"] == sum(layer["sizes"][results["options"].index(layer["option"])] for layer in results["layers"].values())
    assert results["check"]["uniform_bits_per_weight"] >= results["check"]["bits_per_weight"] > 4.3
    for layers in results["parts"].values():
        assert len({results["layers"][one]["option"] for one in layers}) == 1
    plan = read_recipe(tmp_path / "out" / "recipe.toml")
    again = fewbits.compress(small, plan, tmp_path / "again", calibration=texts["calibration"], probe=None)
    assert weights_file(tmp_path / "again") == weights_file(tmp_path / "out") and again["results"]["bits"] == made["bits"]
    assert not (tmp_path / "out.work").exists()
    jsonschema.validate(json.loads(json.dumps(record)), schema())
    assert json.loads((tmp_path / "out" / "allocation.json").read_text()) == json.loads(json.dumps(record))


def test_a_budget_of_bytes_is_that_of_the_whole_file(small, tmp_path, texts):
    dense = open_model(small).file_bytes()
    for number, budget in enumerate((f"{int(0.94 * dense)}B", f"{0.945 * dense / 1e6:.3f}MB")):
        output = tmp_path / str(number)
        record = allocate(small, Request(budget, GRID, sensitivity="output"), output, **texts)
        limit = (0.94, 0.9455)[number] * dense
        assert open_model(output).file_bytes() <= limit
        assert len({layer["option"] for layer in record["results"]["layers"].values()}) > 1


def test_a_stopped_run_goes_on_and_ends_in_the_same_recipe_and_file(small, tmp_path, texts):
    request = Request(4.6, GRID, sensitivity="output")
    allocate(small, request, tmp_path / "whole", **texts)

    def stop(block, blocks, what, error, left):
        if "proj" in what and block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        allocate(small, request, tmp_path / "stopped", options=StreamOptions(progress=stop), **texts)
    assert (tmp_path / "stopped.work" / "trials" / "block-00002.json").exists() and not (tmp_path / "stopped").exists()
    seen = []
    options = StreamOptions(progress=lambda block, blocks, what, *_: seen.append(what))
    allocate(small, request, tmp_path / "stopped", options=options, **texts)
    assert not any("trials" in what for what in seen)
    assert (tmp_path / "stopped" / "recipe.toml").read_bytes() == (tmp_path / "whole" / "recipe.toml").read_bytes()
    assert weights_file(tmp_path / "stopped") == weights_file(tmp_path / "whole")
    (tmp_path / "stopped.work").mkdir()  # as if the run had been killed while it tidied up
    assert allocate(small, request, tmp_path / "stopped", **texts)["results"]["layers"] and not (tmp_path / "stopped.work").exists()
    other = Request(4.6, GRID, bits=(2, 4), sensitivity="output")
    with pytest.raises(KeyboardInterrupt):
        allocate(small, request, tmp_path / "other", options=StreamOptions(progress=stop), **texts)
    with pytest.raises(InputError, match="other settings"):
        allocate(small, other, tmp_path / "other", **texts)
    options = allocate(small, other, tmp_path / "other", fresh=True, **texts)["results"]["options"]
    assert options == ["rtn:bits=2,group_size=16", "rtn:bits=4,group_size=16"]


def test_methods_that_rank_blocks_give_each_block_one_option(small, tmp_path, texts):
    record = allocate(small, Request("6bpw", ("layerwise", *GRID), bits=(8, 2)), tmp_path / "layerwise", **texts)
    results = record["results"]
    assert set(results["parts"]) == {f"model.layers.{index}" for index in range(3)} == set(results["scores"])
    best = max(results["scores"], key=results["scores"].__getitem__)
    chosen = {part: {results["layers"][one]["option"] for one in layers} for part, layers in results["parts"].items()}
    assert all(len(options) == 1 for options in chosen.values()) and chosen[best] == {"rtn:bits=8,group_size=16"}
    method = "cptquant:windows=4,draws=1"
    settled = allocate(small, Request(None, (method,)), tmp_path / "recipe.toml", **texts)["results"]
    assert {layer["option"] for layer in settled["layers"].values()} <= {
        "rtn:bits=16",
        "rtn:bits=8,group_size=0",
        "rtn:bits=4,group_size=0",
    }
    assert isinstance(read_recipe(tmp_path / "recipe.toml"), Plan) and not (tmp_path / "recipe.toml.work").exists()


def test_the_main_method_is_what_most_layers_have():
    options = [Gptq(bits=2), Gptq(bits=3)]
    plan = make_plan({"a": 1, "b": 0, "c": 1}, options, ("head*",))
    assert plan == Plan(options[1], ("head*",), (("b", options[0]),))


@pytest.mark.parametrize(
    ("request_of", "says"),
    [
        (lambda: Request("3 apples", GRID), "the budget '3 apples' is not right; bits a weight such as 3.25bpw"),
        (lambda: Request(120000000, GRID), "120000000 bits a weight is too much; bytes are said as 120000000B"),
        (lambda: Request(None, GRID), "a budget is needed"),
        (lambda: Request(0.5, GRID, sensitivity="output"), "too small"),
        (lambda: Request("1kB", GRID, sensitivity="output"), "too small"),
        (lambda: Request(3.0, ("awk",)), "did you mean 'awq'"),
        (lambda: Request(3.0, GRID, solver="simplex"), "solver='simplex' is not known; ilp or greedy"),
    ],
)
def test_wrong_requests_are_named(small, tmp_path, texts, request_of, says):
    with pytest.raises(InputError, match=says):
        allocate(small, request_of(), tmp_path / "out", **texts)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_written_over(small, tmp_path, texts):
    (tmp_path / "recipe.toml").write_text("kept")
    with pytest.raises(InputError, match=r"recipe\.toml exists"):
        allocate(small, Request(3.0, GRID), tmp_path / "recipe.toml", **texts)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(InputError, match="not empty"):
        allocate(small, Request(3.0, GRID), tmp_path / "full", **texts)
    assert (tmp_path / "recipe.toml").read_text() == "kept"


@pytest.mark.slow
def test_mixed_widths_beat_one_width_at_equal_bytes_on_held_out_text(first_blocks, tmp_path, texts):
    texts = {name: replace(text, count=12, length=128) for name, text in texts.items()}
    request = Request("3.25bpw", ("rtn:group_size=128",), sensitivity="hessian")
    check = allocate(first_blocks, request, tmp_path / "out", **texts)["results"]["check"]
    assert check["uniform_bits_per_weight"] >= check["bits_per_weight"] and check["bits_per_weight"] <= 3.25
    assert check["beats_uniform"] and check["kl"]["interval"][1] < 0
    assert Rtn(bits=3).bits == 3 and check["uniform"].startswith("rtn:bits=3,group_size=")
