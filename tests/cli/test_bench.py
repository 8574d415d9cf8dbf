"""fewbits bench as typed."""

import json

import pytest

QUICK = ("--rounds", 2, "--prompt-tokens", 8, "--new-tokens", 2)


@pytest.mark.slow
def test_terms_of_a_dense_model_are_timed_beside_it(run, first_blocks, tmp_path):
    status, out, _ = run("bench", first_blocks, "--terms", "rtn:bits=4,group_size=32", *QUICK, "--json", "--plot", tmp_path / "roof.svg")
    record = json.loads(out)
    assert status == 0 and record["kind"] == "bench" and record["settings"]["dense_dtype"] == "bfloat16"
    models = record["results"]["models"]
    assert set(models) == {"compressed", "dense"}
    linears = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 768)
    bits = {"compressed": 4 + 20 / 32, "dense": 16}  # codes, and a scale and a zero point for each group
    rest = {"compressed": 4, "dense": 2}  # bytes of a dense number: the head's, the norms' and the rotary table's stay
    for name, row in models.items():
        assert abs(row["bytes_read"] - linears * bits[name] / 8 - (4096 * 256 + 5 * 256) * rest[name]) < 2000
    assert sum(row["layers"] for row in record["results"]["layers"]) == 14
    assert (tmp_path / "roof.svg").read_text().startswith("<svg")
    status, out, _ = run("bench", first_blocks, "--terms", "rtn:bits=4,group_size=32", *QUICK)
    assert status == 0 and "times as many tokens a second as the dense model" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "is not compressed; a folder that compress wrote, or --terms rtn:bits=4, would be right"),
        (("--terms", "gptq:bits=4"), "gptq needs calibration; a method without it, such as rtn or hqq, would be right"),
        (("--terms", "rtn:bits=4", "--prompt-tokens", 100_000), "tokens are more than the"),
        (("--rounds", 0), "rounds=0 is out of range"),
    ],
)
def test_wrong_input_is_said_in_one_line(run, first_blocks, arguments, said):
    status, out, error = run("bench", first_blocks, *arguments)
    assert (status, out) == (2, "") and said in error and error.count("\n") == 1
