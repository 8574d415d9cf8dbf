"""The table of what fits where."""

import importlib.util
import json
from pathlib import Path

import pytest

from fewbits.core.registry import list_methods
from fewbits.export.target import list_targets

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("support_matrix", ROOT / "scripts/support_matrix.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed():
    return {row["method"]: row for row in json.loads((ROOT / "results/export/support.json").read_text())["rows"]}


def test_rows_are_what_the_formats_say_now(script):
    specs = ["rtn", "gptq", "hqq", "apiq", "smoothquant", "gptq:activation_order=true"]
    made = {row["method"]: row for row in script.matrix(specs, list_targets())}
    assert made["rtn"]["awq"] == "yes" and made["hqq"]["awq"] == "no" and made["smoothquant"]["compressed-tensors"] == "behind norms"
    assert made["gptq, activation_order=true"] == {
        "method": "gptq, activation_order=true",
        "stored": "uniform, permutation of inputs",
        **{name: "yes" if name in ("dense", "gptq", "onnx", "peft") else "no" for name in list_targets()},
    }
    assert all(committed()[name] == row for name, row in made.items())


def test_the_file_names_all_formats_and_no_unknown_method():
    assert {tuple(row) for row in committed().values()} == {("method", "stored", *list_targets())}
    assert {name.partition(",")[0] for name in committed()} <= set(list_methods())


def test_check_writes_nothing_and_says_what_is_stale(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "RESULT", tmp_path / "support.json")
    monkeypatch.setattr(script, "list_methods", lambda family: ["rtn"] if family == "weights" else [])
    assert script.main(check=True) == 1 and not (tmp_path / "support.json").exists()
    assert "support.json is stale" in capsys.readouterr().out
    assert script.main(check=False) == 0 and script.main(check=True) == 0
