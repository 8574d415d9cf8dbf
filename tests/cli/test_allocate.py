import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.cli.allocate import verdict_line
from fewbits.models.source import open_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small random model and a text."""
    root = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_hidden_layers=2, **sizes)).save_pretrained(root / "model")
    open_model("builtin:tiny-lm").tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text("".join(f"def add{i}(a, b):\n    return a + b * {i}\n" for i in range(200)))
    return root


def options(place):
    return "--data", place / "text.txt", "--heldout", place / "text.txt", "--samples", 4, "--seq-len", 32, "--windows", 4


def test_it_writes_a_folder_and_says_what_came_out(run, place, tmp_path):
    wanted = ("-m", "rtn:group_size=16", "--options", "2,4,8", "--sensitivity", "hessian", "--tie")
    status, output, _ = run("allocate", place / "model", "--budget", "4.6bpw", *wanted, "-o", tmp_path / "out", *options(place))
    assert status == 0 and "rtn:bits=4,group_size=16" in output and "bits per weight over" in output
    assert "better than rtn:bits=" in output and "KL to the original" in output
    status, printed, _ = run(
        "allocate", place / "model", "--budget", "4.6", *wanted, "-o", tmp_path / "recipe.toml", *options(place), "--json"
    )
    record = json.loads(printed)
    assert status == 0 and record["kind"] == "allocate" and record["settings"]["bits"] == [2, 4, 8]
    assert (tmp_path / "recipe.toml").read_bytes() == (tmp_path / "out" / "recipe.toml").read_bytes()
    common = ("--data", place / "text.txt", "--samples", 4, "--seq-len", 32, "--probe", "none", "--json")
    status, printed, _ = run("compress", place / "model", "--recipe", tmp_path / "recipe.toml", "-o", tmp_path / "again", *common)
    assert status == 0 and sum(json.loads(printed)["results"]["bits"].values()) == record["results"]["bits"]
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--budget", "3 miles"), "bits a weight such as 3.25bpw"),
        ((), "a budget is needed"),
        (("--budget", "3", "--options", "2,x"), "bits with commas between them"),
        (("--budget", "3", "--sensitivity", "guess"), "kl, hessian, fisher, output are"),
        (("--budget", "3", "--solver", "luck"), "ilp or greedy would be right"),
        (("--budget", "3", "-m", "layerwize"), "did you mean 'layerwise'"),
        (("--budget", "1", "-m", "rtn", "--sensitivity", "output"), "too small"),
    ],
)
def test_wrong_input_ends_in_one_line(run, place, tmp_path, arguments, says):
    status, output, error = run("allocate", place / "model", *arguments, "-o", tmp_path / "out", *options(place))
    assert status == 2 and not output and says in error.splitlines()[-1] and not (tmp_path / "out").exists()


def test_the_verdict_is_said_for_better_or_worse():
    verdict = {"difference": -0.01, "interval": (-0.02, -0.004), "said": "better"}
    check = {"beats_uniform": True, "uniform": "gptq:bits=3", "uniform_bits_per_weight": 3.3, "bits_per_weight": 3.25}
    line = verdict_line(check | {"kl": verdict, "loss": verdict})
    assert line.startswith("on held-out text better than gptq:bits=3 for all layers at 3.3000 bits: KL to the original -0.01 nats")
    assert "(-0.02 to -0.004, better)" in line
    lost = verdict_line(check | {"kl": verdict, "loss": verdict, "beats_uniform": False, "uniform_bits_per_weight": 3.1})
    assert "NOT better than" in lost and "at 3.1000 bits, which takes fewer bytes:" in lost


def test_a_method_that_allocates_is_no_method_to_compress_with(run, place, tmp_path):
    status, output, error = run("compress", place / "model", "-m", "layerwise", "-o", tmp_path / "out")
    assert status == 2 and not output and "fewbits allocate -m layerwise would be right" in error.splitlines()[-1]
    assert not list(tmp_path.iterdir())
    status, output, _ = run("show", "cptquant")
    assert status == 0 and "2412.03599" in output and "prune_share = 0.3" in output
