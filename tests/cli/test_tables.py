"""Embedding and head compressed, as typed."""

import json

import pytest

RECIPE = """
[method]
name = "rtn"
bits = 4
group_size = 16
[embeddings]
name = "hqq"
bits = 8
group_size = 16
"""


@pytest.mark.slow
def test_options_go_over_a_recipe_and_both_are_written_down(run, small_model, tmp_path):
    root = small_model(2)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    common = ("--recipe", tmp_path / "recipe.toml", "--data", root / "text.txt", "--samples", 2, "--seq-len", 16)
    done = run("compress", root / "model", *common, "--head", "gptq:bits=4,group_size=16", "--probe", "none", "-o", root / "out", "--json")
    assert done[0] == 0, done[2]
    record = json.loads(done[1])
    plan = record["settings"]["plan"]
    assert (plan["embeddings"]["bits"], plan["head"]["bits"], plan["method"]["bits"]) == (8, 4, 4)
    assert {"model.embed_tokens", "lm_head"} <= record["results"]["layers"].keys() and record["results"]["kept"] == {}
    printed = run("compress", root / "model", *common, "--embeddings", "rtn:bits=3", "-o", root / "other")
    assert printed[0] == 0 and "kept as they were: lm_head" in " ".join(printed[1].split())
    evaluated = run("evaluate", root / "out", "--data", root / "held.txt", "--windows", 2, "--seq-len", 16, "--json")
    assert evaluated[0] == 0 and json.loads(evaluated[1])["results"]["perplexity"] > 1
    estimate = run("compress", root / "model", *common, "--head", "rtn", "-o", root / "third", "--dry-run")
    assert estimate[0] == 0 and "without embedding and head" in " ".join(estimate[1].split()) and not (root / "third").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--head", "rtm"), "no method is called 'rtm'; did you mean 'rtn'?"),
        (("--embeddings", "rtn:bit=3"), "rtn has no field 'bit'; did you mean 'bits'?"),
        (("--embeddings", "rtn:bits=3", "--head", "rtn:bits=4"), "one method for both would be right"),
        (("--head", "bitstack"), "bitstack compresses no embedding or head by itself"),
        (("--dry-run", "--embeddings", "squeezellm"), "squeezellm compresses no embedding or head by itself"),
    ],
)
def test_what_is_wrong_is_one_line(run, tmp_path, options, says):
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 60)
    common = ("-m", "rtn", "-o", tmp_path / "out", "--data", tmp_path / "text.txt", "--seq-len", 32, "--samples", 2)
    status, output, error = run("compress", "builtin:tiny-lm", *common, *options)
    assert status == 2 and output == "" and says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()
