import json
import runpy
from pathlib import Path

ROW = {"method": "rtn", "bits": 3, "bits_per_weight": 3.25, "perplexity": 12.5, "perplexity_stderr": 0.1, "reference_perplexity": 12.0}
ROW |= {"delta_loss": 0.04, "delta_loss_interval": [0.03, 0.05], "kl_mean": 0.02, "top1_agreement": 0.9}


def test_a_region_is_filled_from_its_result_and_nothing_else_changes(tmp_path):
    refreshed = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "tables.py"))["refreshed"]
    (tmp_path / "r.json").write_text(json.dumps({"rows": [ROW]}))
    text = "before\n<!-- table: r.json -->\nold\n<!-- end -->\nafter\n"
    made = refreshed(text, tmp_path)
    assert made.startswith("before\n<!-- table: r.json -->\n| method |") and made.endswith("<!-- end -->\nafter\n")
    assert "| rtn 3 bits | 3.250 | 12.50 ± 0.10 | +0.0400 [+0.0300, +0.0500] | 0.0200 | 0.900 |" in made and "old" not in made
    assert refreshed(made, tmp_path) == made


def test_other_methods_are_set_beside_at_equal_bits(tmp_path):
    module = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "tables.py"))
    curve = [ROW | {"bits_per_weight": bits, "kl_mean": kl} for bits, kl in ((2.0, 0.4), (3.0, 0.5), (4.0, 0.1))]  # 3 bits are beaten by 2
    for name, rows in (("gptq", curve), ("rtn", curve), ("new", [ROW | {"bits_per_weight": 3.0}, ROW | {"bits_per_weight": 5.0}])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"method": name, "rows": rows}))
    made = module["table"](tmp_path / "new.json").splitlines()
    assert made[3].endswith("| 0.2000 | 0.2000 |")  # the root of 0.4 x 0.1
    assert made[4].endswith("| — | — |")
    assert "KL of gptq" not in module["table"](tmp_path / "gptq.json")


def test_rows_of_another_kind_show_their_fields(tmp_path):
    table = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "tables.py"))["table"]
    (tmp_path / "r.json").write_text(json.dumps({"rows": [{"share": 0.3, "accuracy": 0.912345, "other": [1]}]}))
    assert table(tmp_path / "r.json") == "| share | accuracy |\n| --- | --- |\n| 0.3 | 0.9123 |\n"
