import csv
import io
import shlex

from fewbits.reports.commands import commands
from fewbits.reports.tables import csv_table, markdown_table


def test_markdown_has_a_line_for_each_and_says_what_is_known(record):
    lines = markdown_table(record).splitlines()
    assert len(lines) == 2 + 1 + 5 + 2 and {line.count(" | ") for line in lines[:8]} == {8}
    assert lines[2].startswith("| dense |") and "10.000" in lines[2]
    assert lines[3] == "| rtn:bits=3 | 3.250 | 10.200 | +0.2000 [+0.1900, +0.2100] | 0.2000 | 80.0% | baseline | 64.5 | 640 |"
    assert lines[5].startswith("| **gptq:bits=3** |") and "better (-0.1000 [-0.1300, -0.0700])" in lines[5]
    assert "2.0e-04 nats" in lines[-1]


def test_csv_holds_the_numbers_in_full(record):
    rows = list(csv.DictReader(io.StringIO(csv_table(record))))
    assert [row["configuration"] for row in rows] == [row["name"] for row in record["results"]["configurations"]]
    assert all(None not in row and None not in row.values() for row in rows)
    assert float(rows[1]["kl_mean"]) == 0.04 and rows[0]["verdict"] == "baseline" and rows[0]["difference_low"] == ""
    assert float(rows[2]["difference_to_baseline"]) == record["results"]["pairs"]["gptq:bits=3"]["rtn:bits=3"]["difference"]
    assert [row["pareto"] for row in rows] == ["0", "0", "1", "1", "1"] and float(rows[3]["seconds"]) == 64.5


def test_commands_are_whole_and_quoted(record):
    made = commands(record)
    words = shlex.split(made["all"])
    assert words[:3] == ["fewbits", "compare", "builtin:tiny-lm"] and words.count("-m") == 5
    assert words[words.index("--data") + 1] == "my text.txt" and words[words.index("--prompt") + 1] == "def f(x):"
    compress, evaluate = (shlex.split(line) for line in made["single"]["gptq:bits=3"])
    assert compress[:7] == ["fewbits", "compress", "builtin:tiny-lm", "-m", "gptq", "--set", "bits=3"]
    assert evaluate[evaluate.index("--reference") + 1] == "builtin:tiny-lm" and evaluate[2] == compress[-1]
    original = commands(record | {"settings": record["settings"] | {"inputs": "original"}})
    assert "--inputs original" in original["all"] and "--inputs original" in original["single"]["evil"][0]
