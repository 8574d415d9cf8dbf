import json
import sys

import pytest

from fewbits.cli.main import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the program as typed: exit status, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fewbits", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code or 0, *capsys.readouterr()

    return run


def test_methods_and_show_speak_json_and_prose(run):
    status, output, _ = run("methods", "--json")
    assert status == 0 and {"gptq", "rtn"} <= {row["name"] for row in json.loads(output)}
    status, output, _ = run("show", "gptq", "--json")
    assert json.loads(output)["fields"]["damping"] == 0.01 and json.loads(output)["needs"] == ["hessian"]
    assert "activation_order = False" in run("show", "gptq")[1]
    assert "2210.17323" in run("methods")[1]
    assert "0.zero_points: " in run("show", "gptq")[1]
    assert json.loads(run("show", "pb_llm", "--json")[1])["stored_bits_per_weight"]


def test_compress_evaluate_and_generate_from_end_to_end(run, tmp_path):
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 60)
    common = ("--data", tmp_path / "text.txt", "--seq-len", 32, "--json")
    out = tmp_path / "out"
    status, output, _ = run("compress", "builtin:tiny-lm", "-m", "rtn", "--set", "bits=3", "--set", "group_size=64", "-o", out, *common)
    assert status == 0 and json.loads(output)["results"]["bits_per_weight"] == pytest.approx(3.31, abs=0.01)
    status, output, _ = run("evaluate", out, "--reference", "builtin:tiny-lm", "--windows", 4, *common)
    assert status == 0 and json.loads(output)["results"]["kl_mean"] > 0
    status, output, _ = run("generate", out, "--prompt", "def ", "--max-new-tokens", 4)
    assert status == 0 and output.startswith("def ")


def test_documents_probes_and_streams_are_options(run, tmp_path):
    texts = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * (i % 3 + 1)}) for i in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    given = ("--data", tmp_path / "texts.jsonl", "--seq-len", 24, "--json")
    results = {}
    for name, options in (("folded", ()), ("apart", ("--no-fold",))):
        made = run("compress", "builtin:tiny-lm", "-m", "awq", "-o", tmp_path / name, "--separate", "--probe", "none", *options, *given)
        assert made[0] == 0
        results[name] = json.loads(made[1])["results"]
    assert len(results["folded"]["replaced"]) == 16 and results["apart"]["replaced"] == [] and "probe" not in results["folded"]
    assert results["folded"]["bits_per_weight"] < results["apart"]["bits_per_weight"]
    seen = [run("evaluate", tmp_path / name, "--windows", 4, *extra, *given) for name in results for extra in ((), ("--streamed",))]
    folded, folded_streamed, apart, apart_streamed = [json.loads(output)["results"]["perplexity"] for _, output, _ in seen]
    assert folded == pytest.approx(folded_streamed, rel=1e-3) and apart == pytest.approx(apart_streamed, rel=1e-3)
    assert folded == pytest.approx(apart, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compress", "nowhere", "-m", "rtn"], "'nowhere' is no folder"),
        (["compress", "builtin:tiny-lm", "-m", "gtpq"], "did you mean 'gptq'"),
        (["compress", "builtin:tiny-lm", "-m", "gptq", "--set", "bit=3"], "did you mean 'bits'"),
        (["compress", "builtin:tiny-lm", "-m", "gptq", "--set", "bits"], "name=value would be"),
        (["compress", "builtin:tiny-lm", "-m", "gptq", "--set", "bits=12"], "bits=12 is out of range"),
        (["compress", "builtin:tiny-lm"], "needs a method or a recipe"),
        (["compress", "builtin:tiny-lm", "--recipe", "none.toml"], "cannot be read"),
        (["compress", "builtin:tiny-lm", "-m", "gptq", "--dtype", "bf16"], "did you mean 'bfloat16'"),
        (["compress", "builtin:tiny-lm", "-m", "gptq", "--data", "nothing.txt"], "'nothing.txt' is not a file"),
        (["compress", "builtin:tiny-lm", "-m", "gptq", "--seq-len", "100000000"], "the text is too short"),
        (["evaluate", "nowhere"], "is no folder"),
    ],
)
def test_wrong_input_ends_with_one_line_and_status_2(run, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    extra = ["-o", tmp_path / "out"] if arguments[0] == "compress" else []
    status, output, error = run(*arguments, *extra)
    assert status == 2 and not output
    assert says in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
