import csv
import json

import pytest


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, first in (("seen", 0), ("held", 100)):
        (folder / f"{name}.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(first, first + 100)))
    sizes = ("--samples", 4, "--seq-len", 32, "--windows", 6, "--new-tokens", 3, "--noise-windows", 2, "--prompt", "def f")
    return ("--data", folder / "seen.txt", "--text", folder / "held.txt", *sizes)


def test_compare_prints_a_table_and_writes_the_rest(run, first_blocks, given, tmp_path):
    asked = ("compare", first_blocks, "-m", "rtn", "-m", "gptq:bits=3", "--bits", "2,3", "-o", tmp_path / "out", *given)
    status, output, _ = run(*asked)
    assert status == 0 and "rtn:bits=2" in output and "baseline" in output and "report.html" in output
    status, output, _ = run(*asked, "--json")
    record = json.loads(output)
    assert status == 0 and [row["name"] for row in record["results"]["configurations"]] == ["rtn:bits=2", "rtn:bits=3", "gptq:bits=3"]
    assert record["settings"]["prompts"] == ["def f"] and record["results"]["noise"]["windows"] == 2
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert [float(row["bits_per_weight"]) for row in rows] == [row["bits_per_weight"] for row in record["results"]["configurations"]]
    assert "<title>" in (tmp_path / "out" / "report.html").read_text()


def test_the_commands_that_the_page_shows_give_its_numbers(run, first_blocks, given, tmp_path, monkeypatch):
    import shlex

    from fewbits.reports.commands import commands

    options = ("--inputs", "original", "--json")
    record = json.loads(run("compare", first_blocks, "-m", "gptq:bits=3", "-o", tmp_path / "out", *options, *given)[1])
    compress, evaluate = commands(record)["single"]["gptq:bits=3"]
    monkeypatch.chdir(tmp_path)
    assert run(*shlex.split(compress)[1:], "--probe", "none")[0] == 0
    alone = json.loads(run(*shlex.split(evaluate)[1:], "--json")[1])["results"]
    row = record["results"]["configurations"][0]
    assert row["kl_mean"] == pytest.approx(alone["kl_mean"], rel=1e-4) and row["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-m", "gtpq"], "did you mean 'gptq'"),
        (["-m", "rtn", "--bits", "three"], "--bits 'three' is not right"),
        (["-m", "rtn", "--bits", "12"], "bits=12 is out of range"),
        (["-m", "rtn", "--inputs", "orignal"], "did you mean 'original'"),
        (["-m", "rtn", "--baseline", "gptq"], "the baseline 'gptq' is not compared"),
        (["-m", "rtn", "--repeats", "0"], "repeats=0 is out of range"),
        (["-m", "rtn", "--text", "nothing.txt"], "'nothing.txt' is not a file"),
        ([], "--method"),
    ],
)
def test_wrong_input_is_one_line(run, first_blocks, tmp_path, arguments, says):
    status, output, error = run("compare", first_blocks, *arguments, "-o", tmp_path / "out")
    assert status == 2 and not output and says in error and len(error.strip().splitlines()) == 1


def test_a_dry_run_says_what_it_takes_and_leaves_nothing(run, first_blocks, given, tmp_path, monkeypatch):
    from fewbits.pipeline import preflight

    asked = ("compare", first_blocks, "-m", "rtn", "-m", "gptq:bits=3", "-o", tmp_path / "out", *given)
    status, output, _ = run(*asked, "--dry-run", "--json")
    found = json.loads(output)
    assert status == 0 and list(found) == ["rtn", "gptq:bits=3", "measuring"] and not (tmp_path / "out").exists()
    assert all(one["seconds"] > 0 and one["disk_bytes"] > 0 for one in found.values())
    calibrated = ("--data", given[1], "--samples", 4, "--seq-len", 32)
    status, output, _ = run("compress", first_blocks, "-m", "gptq", "-o", tmp_path / "one", "--dry-run", *calibrated)
    assert status == 0 and "of memory" in output and not (tmp_path / "one").exists() and not (tmp_path / "one.work").exists()
    monkeypatch.setattr(preflight, "available_memory", lambda: 1000)
    for command in (asked, ("compress", first_blocks, "-m", "gptq", "-o", tmp_path / "one", *calibrated)):
        status, output, error = run(*command, "--dry-run")
        assert status == 2 and not output and "the run needs about" in error and len(error.strip().splitlines()) == 1
    monkeypatch.setattr(preflight, "LONG", 1)  # a long run is looked at without being asked
    status, _, error = run("compress", first_blocks, "-m", "gptq", "-o", tmp_path / "one", *calibrated)
    assert status == 2 and "the run needs about" in error and not (tmp_path / "one.work").exists()
