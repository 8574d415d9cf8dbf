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
