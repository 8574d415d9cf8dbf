import importlib.util
import runpy
from pathlib import Path

import pytest
import torch

from fewbits.core.method import Statistics

SCRIPT = Path(__file__).parents[2] / "scripts" / "new_method.py"


def test_a_new_method_runs_and_has_a_claim_to_prove(tmp_path):
    create = runpy.run_path(str(SCRIPT))["create"]
    made = create(tmp_path, "weights", "two_words")
    assert [str(path.relative_to(tmp_path)) for path in made] == [
        "src/fewbits/methods/weights/two_words.py",
        "tests/methods/weights/test_two_words.py",
        "docs/methods/weights/two_words.md",
    ]
    spec = importlib.util.spec_from_file_location("two_words", made[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    weight = torch.randn(8, 16)
    assert module.TwoWords(bits=8).compress(weight, Statistics()).decode().sub(weight).abs().max() < 0.05
    compile(made[1].read_text(), str(made[1]), "exec")


def test_nothing_is_overwritten_and_names_are_checked(tmp_path):
    create = runpy.run_path(str(SCRIPT))["create"]
    create(tmp_path, "weights", "mine")
    with pytest.raises(SystemExit, match=r"mine\.py exists"):
        create(tmp_path, "weights", "mine")
    with pytest.raises(SystemExit, match="cannot be a module"):
        create(tmp_path, "weights", "My-Method")
