import json


def test_reproduce_prints_both_tables_and_writes_a_file(run, first_blocks, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(200)))
    text = ("--text", tmp_path / "text.txt", "--data", tmp_path / "text.txt")
    sizes = ("--windows", 4, "--length", 32, "--samples", 4, "--seq-len", 32)
    status, output, _ = run("reproduce", "gptq", "--model", first_blocks, "-o", tmp_path / "gptq.json", *text, *sizes)
    assert status == 0 and "8.07" in output and "25.54" in output and "differs in the model" in output
    written = json.loads((tmp_path / "gptq.json").read_text())
    assert f"{written['results']['dense']:.2f}" in output and written["kind"] == "reproduce"


def test_wrong_input_ends_in_one_line(run, tmp_path):
    status, _, said = run("reproduce", "hqq", "-o", tmp_path / "hqq.json")
    assert status == 2 and said.count("\n") == 1 and "squeezellm" in said
    status, _, said = run("reproduce", "gptq", "-o", tmp_path)
    assert status == 2 and "is a folder" in said
