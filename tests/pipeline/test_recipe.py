import pytest

from fewbits.core.errors import InputError
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.rtn import Rtn
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.recipe import read_recipe, recipe_text

RECIPE = """
keep = ["*.0.*"]
[method]
name = "gptq"
bits = 3
damping = 1
[[overrides]]
layers = "*.down_proj"
name = "rtn"
bits = 8
"""


def test_a_recipe_is_the_plan_that_python_would_make(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    assert read_recipe(path) == Plan(Gptq(bits=3, damping=1.0), ("*.0.*",), (("*.down_proj", Rtn(bits=8)),))
    assert read_recipe(path, {"bits": "2"}).method == Gptq(bits=2, damping=1.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[method", "is not TOML"),
        ("[method]\nbits = 3", "needs a name"),
        ("[method]\nname = 'gtpq'", "did you mean 'gptq'"),
        ("[method]\nname = 'gptq'\nbit = 3", "did you mean 'bits'"),
        ("[method]\nname = 'gptq'\nbits = 'three'", "a whole number would be"),
        ("[method]\nname = 'gptq'\n[[override]]\nlayers = 'x'", "did you mean 'overrides'"),
        ("keep = 'x'\n[method]\nname = 'gptq'", "a list of patterns"),
        ("[method]\nname = 'gptq'\n[[overrides]]\nname = 'rtn'", "an override needs layers"),
        ("[method]\nname = 'gptq'\n[head]\nbits = 4", "a method needs a name"),
        ("[method]\nname = 'gptq'\n[embedding]\nname = 'rtn'", "did you mean 'embeddings'"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_said(tmp_path, text, says):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        read_recipe(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    "plan",
    [
        Plan(Gptq(bits=3, damping=1e-05, group_size=None)),
        Plan(Gptq(), embeddings=Rtn(bits=8), head=Gptq(bits=4)),
        Plan(Rtn(bits=16), ("*.0.*", 'odd"name'), (("a.b", Rtn(bits=2, symmetric=True, search="mse")), ("*", Gptq()))),
    ],
)
def test_a_plan_that_is_written_down_is_read_back_as_it_was(plan, tmp_path):
    (tmp_path / "recipe.toml").write_text(recipe_text(plan))
    assert read_recipe(tmp_path / "recipe.toml") == plan
