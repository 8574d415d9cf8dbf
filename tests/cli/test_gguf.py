"""GGUF files, as typed."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits import TextSample, api
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import open_model


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    pytest.importorskip("gguf", reason="pip install 'fewbits[gguf]'")
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("made")
    sizes = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).save_pretrained(root / "dense")
    open_model("builtin:tiny-lm").tokenizer().save_pretrained(root / "dense")
    method = Rtn(bits=4, group_size=32, symmetric=True)
    api.compress(root / "dense", method, root / "small", calibration=TextSample("builtin:calibration", 1, 16), probe=None)
    api.export(root / "small", "gguf", root / "small.gguf")
    return root / "small.gguf"


def test_a_file_is_measured_against_the_folder_that_it_was_made_of(run, file):
    status, said, _ = run("evaluate", file, "--reference", file.with_suffix(""), "--windows", 2, "--seq-len", 32, "--json")
    results = json.loads(said)["results"]
    assert status == 0 and results["kl_mean"] < 1e-6 and results["file_bytes"] == file.stat().st_size


def test_a_file_writes_text(run, file):
    status, said, _ = run("generate", file, "--prompt", "def f", "--max-new-tokens", 3)
    assert status == 0 and said.startswith("def f")


def test_a_file_that_is_damaged_ends_in_one_line(run, file, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:3000])
    status, _, said = run("evaluate", tmp_path / "cut.gguf")
    assert status == 2 and "cut.gguf cannot be read as GGUF" in said and len(said.strip().splitlines()) == 1
