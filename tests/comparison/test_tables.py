"""A recipe that compresses the embedding too, compared."""

import pytest

import fewbits
from fewbits.comparison.samples import Samples
from fewbits.pipeline.recipe import read_recipe

RECIPE = """
[method]
name = "gptq"
bits = 4
group_size = 64
[embeddings]
name = "rtn"
bits = 3
group_size = 64
"""


@pytest.mark.slow
def test_the_numbers_are_those_of_compress_and_evaluate(first_blocks, texts, tmp_path):
    seen, held = texts
    (tmp_path / "tables.toml").write_text(RECIPE)
    specs = [str(tmp_path / "tables.toml"), "gptq:bits=4,group_size=64"]
    settings = fewbits.CompareSettings(samples=Samples(("def add(a, b):",), 2), noise_windows=0)
    record = fewbits.compare(first_blocks, specs, tmp_path / "compared", calibration=seen, text=held, settings=settings)
    rows = {row["name"]: row for row in record["results"]["configurations"]}
    made = fewbits.compress(first_blocks, read_recipe(tmp_path / "tables.toml"), tmp_path / "out", calibration=seen, probe=None)
    alone = fewbits.evaluate(tmp_path / "out", reference=first_blocks, text=held, streamed=True)["results"]
    row = rows[specs[0]]
    assert row["bits_per_weight"] == made["results"]["bits_per_weight"]
    for key in ("kl_mean", "perplexity", "top1_agreement"):
        assert row[key] == pytest.approx(alone[key], rel=1e-5, abs=1e-7), key
    assert row["kl_mean"] > rows[specs[1]]["kl_mean"]  # a table of 3 bits loses something
