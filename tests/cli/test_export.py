"""fewbits export, as typed."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits import TextSample, api
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import open_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    dense, path = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("made") / "rtn"
    sizes = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).save_pretrained(dense)
    open_model("builtin:tiny-lm").tokenizer().save_pretrained(dense)
    api.compress(dense, Rtn(bits=3, group_size=32), path, calibration=TextSample("builtin:calibration", 1, 16), probe=None)
    return path


def test_a_folder_is_written_and_said(run, folder, tmp_path):
    status, said, _ = run("export", folder, "--to", "gptq:checkpoint_format=gptq_v2", "-o", tmp_path / "out")
    assert status == 0 and "out: 7 compressed layers" in " ".join(said.split())
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "config.json",
        "quantize_config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_json_is_one_object(run, folder, tmp_path):
    status, said, _ = run("export", folder, "--to", "dense", "-o", tmp_path / "out", "--json")
    record = json.loads(said)
    assert status == 0 and record["kind"] == "export" and record["results"]["layers"] == 7


def test_what_does_not_fit_is_one_line_and_status_2(run, folder, tmp_path):
    status, said, error = run("export", folder, "--to", "awq", "-o", tmp_path / "out")
    assert (status, said) == (2, "") and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert "awq cannot hold model.layers.0" in error and "its codes have 3 bits, where 4 have a layout; compressed-tensors" in error


def test_requantized_layers_are_said_with_their_largest_loss(run, folder, tmp_path):
    status, said, _ = run("export", folder, "--to", "awq:group_size=32", "-o", tmp_path / "out", "--requantize")
    assert status == 0
    assert "requantized 7 (its codes have 3 bits, where 4 have a layout): squared weight error over squared weight at most" in said


def test_formats_are_listed(run):
    status, said, _ = run("export", "--list")
    assert status == 0 and "awq: GPTQModel" in said and "compressed-tensors: transformers" in said
    status, said, _ = run("export", "--list", "--json")
    assert {"name", "readers", "extra"} == set(json.loads(said)[0]) and "dense" in [one["name"] for one in json.loads(said)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "gptq"), "export needs a folder, a format and an output"),
        (("nowhere", "--to", "gptq", "-o", "out"), "nowhere is no folder that fewbits compressed"),
        (("nowhere", "--to", "gguff", "-o", "out"), "no format is called 'gguff'; did you mean 'gguf'?"),
    ],
)
def test_wrong_input_is_one_line(run, arguments, said):
    status, _, error = run("export", *arguments)
    assert status == 2 and said in error and error.count("\n") == 1
