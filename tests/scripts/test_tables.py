import json
import runpy
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
ROW = {"method": "rtn", "bits": 3, "bits_per_weight": 3.25, "perplexity": 12.5, "perplexity_stderr": 0.1, "reference_perplexity": 12.0}
ROW |= {"delta_loss": 0.04, "delta_loss_interval": [0.03, 0.05], "kl_mean": 0.02, "top1_agreement": 0.9}


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    """Scripts find each other, as they do where they are run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_a_region_is_filled_from_its_result_and_nothing_else_changes(tmp_path):
    refreshed = runpy.run_path(str(SCRIPTS / "tables.py"))["refreshed"]
    (tmp_path / "r.json").write_text(json.dumps({"rows": [ROW]}))
    text = "before\n<!-- table: r.json -->\nold\n<!-- end -->\nafter\n"
    made = refreshed(text, tmp_path)
    assert made.startswith("before\n<!-- table: r.json -->\n| method |") and made.endswith("<!-- end -->\nafter\n")
    assert "| rtn 3 bits | 3.250 | 12.50 ± 0.10 | +0.0400 [+0.0300, +0.0500] | 0.0200 | 0.900 |" in made and "old" not in made
    assert refreshed(made, tmp_path) == made


def test_other_methods_are_set_beside_at_equal_bits(tmp_path):
    module = runpy.run_path(str(SCRIPTS / "tables.py"))
    curve = [ROW | {"bits_per_weight": bits, "kl_mean": kl} for bits, kl in ((2.0, 0.4), (3.0, 0.5), (4.0, 0.1))]  # 3 bits are beaten by 2
    for name, rows in (("gptq", curve), ("rtn", curve), ("new", [ROW | {"bits_per_weight": 3.0}, ROW | {"bits_per_weight": 5.0}])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"method": name, "rows": rows}))
    made = module["table"](tmp_path / "new.json").splitlines()
    assert made[3].endswith("| 0.2000 | 0.2000 |")  # the root of 0.4 x 0.1
    assert made[4].endswith("| — | — |")
    assert "KL of gptq" not in module["table"](tmp_path / "gptq.json")


def test_rows_of_another_kind_show_their_fields(tmp_path):
    table = runpy.run_path(str(SCRIPTS / "tables.py"))["table"]
    (tmp_path / "r.json").write_text(json.dumps({"rows": [{"share": 0.3, "accuracy": 0.912345, "other": [1]}]}))
    assert table(tmp_path / "r.json") == "| share | accuracy |\n| --- | --- |\n| 0.3 | 0.9123 |\n"


def test_timed_products_have_tables_of_their_own(tmp_path):
    table = runpy.run_path(str(SCRIPTS / "tables.py"))["table"]
    row = {"shape": [64, 32], "threads": 1, "vectors": 1, "weights": "uniform 4 bit", "of_read_pass": [0.5, 0.4, 0.6]}
    many = row | {"vectors": 8, "milliseconds": [1.25, 1.0, 1.5], "times_as_fast_as_float32": 2.5}
    (tmp_path / "one.json").write_text(json.dumps({"rows": [row, row | {"threads": 2}, many]}))
    first, second = (part.splitlines() for part in table(tmp_path / "one.json").split("\n\n"))
    assert first[0] == "| 1 vector | 1 thread: 64x32 | 2 threads: 64x32 |"
    assert first[2] == "| uniform 4 bit | 0.50 [0.40, 0.60] | 0.50 [0.40, 0.60] |"
    assert second[2] == "| uniform 4 bit | 1.25 / 2.5 / - |"
    mine = {
        "product": "fewbits 4 bit, groups of 32, 8-bit inputs",
        "shape": [64, 32],
        "threads": 1,
        "vectors": 4,
        "milliseconds": [0.5, 0.4, 0.6],
    }
    mine["times_as_fast_as"] = {"torch int4 4 bit, groups of 32": [1.5, 1.4, 1.6]}
    (tmp_path / "two.json").write_text(json.dumps({"rows": [mine, {"product": "torch bfloat16", "vectors": 4}]}))
    assert "| 1 | 64x32 | 4 bit, groups of 32, 8-bit inputs | 0.50 / 1.50 / - / - |" in table(tmp_path / "two.json")
    speed = {"fast": {"giga_operations": {"median": 400.4}, "times_torch_bfloat16": {"median": 1.5}}, "lost": {"samples": 0}}
    products = [{"shape": "64x32", "threads": 2, "vectors": vectors, "table": speed} for vectors in (4, 16)]
    (tmp_path / "three.json").write_text(json.dumps({"products": products}))
    made = table(tmp_path / "three.json").splitlines()
    assert made[0] == "| 64x32, 2 threads | 4 vectors | 16 vectors |" and made[2:4] == [
        "| fast | 400 (1.50) | 400 (1.50) |",
        "| lost | - | - |",
    ]
