import json
import subprocess
import sys

import pytest

import fewbits
from fewbits.export.checkpoint import read_stack
from fewbits.methods.weights.bitstack import Bitstack


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "stack"
    sample = fewbits.TextSample(count=2, length=32)
    record = fewbits.compress("builtin:tiny-lm", Bitstack(blocks=2, order="random"), output, calibration=sample, probe=None)
    return output, record["results"]


def test_evaluate_and_generate_take_a_size(run, folder):
    output, results = folder
    sizes = read_stack(output).sizes
    common = ("--windows", 2, "--seq-len", 32, "--json")
    found = {}
    for length in (0, 56):
        status, said, _ = run("evaluate", output, "--memory", f"{sizes[length]}B", *common)
        found[length] = json.loads(said)["results"]
        assert status == 0 and found[length]["stored_bytes"] == sizes[length]
    whole = json.loads(run("evaluate", output, *common)[1])["results"]
    assert found[56]["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-6) and whole["perplexity"] < found[0]["perplexity"]
    assert found[56]["bits_per_weight"] == pytest.approx(whole["bits_per_weight"])
    dropped = 8 * (sizes[-1] - sizes[0]) / results["compressed_weights"]
    assert found[0]["bits_per_weight"] == pytest.approx(results["bits_per_weight"] - dropped)
    assert "stored_bytes" not in whole
    status, said, _ = run("generate", output, "--prompt", "def ", "--max-new-tokens", 3, "--memory", "1GB")
    assert status == 0 and said.startswith("def ")


@pytest.mark.parametrize(
    ("model", "memory", "says"),
    [("stack", "1kB", "the smallest size of this model is"), ("stack", "some", "is not a size"), ("builtin:tiny-lm", "1GB", "is no stack")],
)
def test_sizes_that_cannot_be_are_one_line(run, folder, model, memory, says):
    model = folder[0] if model == "stack" else model
    for command in (("generate", model, "--prompt", "x"), ("evaluate", model, "--windows", 2, "--seq-len", 32)):
        status, output, error = run(*command, "--memory", memory)
        assert status == 2 and output == "" and says in error and error.count("\n") == 1


def test_a_process_that_made_none_of_its_parts_loads_a_folder(folder):
    """What a folder holds is known by importing fewbits alone."""
    script = f"import fewbits; print(sum(p.numel() for p in fewbits.load({str(folder[0])!r}, memory='1GB').parameters()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr
