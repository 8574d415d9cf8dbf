import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.models.source import open_model


def test_methods_and_show_speak_json_and_prose(run):
    status, output, _ = run("methods", "--json")
    assert status == 0 and {"gptq", "rtn"} <= {row["name"] for row in json.loads(output)}
    status, output, _ = run("show", "gptq", "--json")
    assert json.loads(output)["fields"]["damping"] == 0.01 and json.loads(output)["needs"] == ["hessian"]
    assert "activation_order = false" in run("show", "gptq")[1]
    assert "2210.17323" in run("methods")[1]
    assert "  zero_points: " in run("show", "gptq")[1]
    assert json.loads(run("show", "pb_llm", "--json")[1])["stored_bits_per_weight"]


def test_show_prints_every_word_and_what_was_measured(run):
    output = run("show", "gptq")[1]
    assert "group_size = 128" in output and "symmetric = false" in output and "(arXiv 2210.17323)" in output
    assert "\nStored: one uniform term" in output  # the docstring without its indentation
    assert "Measured on builtin:tiny-lm" in output and "bits=3, group_size=64: 3.310 bits per weight, perplexity" in output
    assert json.loads(run("show", "gptq", "--json")[1])["measured"][0]["perplexity"] > 1
    assert "None" not in run("methods")[1] + run("show", "hqq")[1]


def test_no_argument_is_a_question(run):
    assert run()[:2] == run("--help")[:2] and run()[0] == 0


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


def test_documents_probes_and_streams_are_options(run, first_blocks, tmp_path):
    texts = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * (i % 3 + 1)}) for i in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    given = ("--data", tmp_path / "texts.jsonl", "--seq-len", 24, "--json")
    results = {}
    for name, options in (("folded", ()), ("apart", ("--no-fold",))):
        made = run("compress", first_blocks, "-m", "awq", "-o", tmp_path / name, "--separate", "--probe", "none", *options, *given)
        assert made[0] == 0
        results[name] = json.loads(made[1])["results"]
    assert len(results["folded"]["replaced"]) == 4 and results["apart"]["replaced"] == [] and "probe" not in results["folded"]
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "nonsense"),
        (["show"], "METHOD"),
        (["show", "gptqq"], "did you mean 'gptq'"),
        (["methods", "--family", "weight"], "did you mean 'weights'"),
        (["compress", "builtin:tiny-lm", "-m", "rtn"], "--output"),
        (["compress", "-m", "rtn", "-o", "x"], "MODEL"),
        (["compress", "builtin:tiny-lm", "-m", "rtn", "-o", "x", "--samples", "abc"], "--samples"),
        (["compress", "builtin:tiny-lm", "-m", "rtn", "-o", "x", "--sample", "3"], "--sample"),
        (["compress", "builtin:tiny-lm", "-m", "rtn", "-o", "x", "--samples", "0"], "1 window would be right"),
        (["compress", "builtin:tiny-lm", "-m", "rtn", "-o", "x", "--set", "group_size=-1"], "1 or more, or none"),
        (["compress", "builtin:tiny-lm", "-m", "rtn", "-o", "x", "--set", "search=minmaxx"], "'minmax' or 'percentile'"),
        (["compress", "builtin:tiny-lm", "-m", "rtn", "-o", "x", "--probe", "nothing.txt"], "'nothing.txt' is not a file"),
        (["evaluate", "builtin:tiny-lm", "--windows", "0"], "1 window would be right"),
        (["evaluate", "builtin:minilm"], "is an encoder"),
        (["evaluate", "builtin:tiny-lm", "--reference", "builtin:minilm"], "is an encoder"),
        (["generate", "builtin:minilm", "--prompt", "x"], "is an encoder"),
        (["generate", "builtin:tiny-lm", "--prompt", ""], "the prompt is empty"),
        (["generate", "builtin:tiny-lm", "--prompt", "x", "--max-new-tokens", "-3"], "max_new_tokens=-3"),
        (["generate", "builtin:tiny-lm", "--prompt", "x", "--temperature", "-1"], "temperature=-1"),
    ],
)
def test_a_mistyped_command_ends_with_one_line_and_status_2(run, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    status, output, error = run(*arguments)
    assert status == 2 and not output
    assert says in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def _without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def _text(name, text):
    return lambda folder: (folder / name).write_text(text)


def _cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: 10**6])


def _index(text):
    return lambda folder: [_without("model.safetensors")(folder), _text("model.safetensors.index.json", text)(folder)]


def _not_a_number(name):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name][:, 4] = torch.nan
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


DAMAGES = {
    "broken configuration": (_text("config.json", "{"), "config.json is not a configuration"),
    "unknown architecture": (_text("config.json", '{"model_type": "nothing"}'), "config.json is not a configuration"),
    "no configuration": (_without("config.json"), "holds no config.json"),
    "no tokenizer": (_without("tokenizer.json", "tokenizer_config.json"), "holds no tokenizer"),
    "broken tokenizer": (_text("tokenizer.json", "{"), "holds no tokenizer"),
    "no weights": (_without("model.safetensors"), "holds no model.safetensors"),
    "cut short": (_cut, "model.safetensors cannot be read as safetensors"),
    "missing shard": (_index('{"weight_map": {"x": "gone.safetensors"}}'), "gone.safetensors is missing"),
    "broken index": (_index('{"weight'), "is no index of safetensors shards"),
    "weight": (_not_a_number("model.layers.0.mlp.up_proj.weight"), "model.layers.0.mlp.up_proj: the weight is not finite"),
    "embedding": (_not_a_number("model.embed_tokens.weight"), "embeddings are not finite"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_model_is_named_in_one_line_and_left_alone(run, tmp_path, damage):
    spoil, says = DAMAGES[damage]
    shutil.copytree(open_model("builtin:tiny-lm").path, tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(50)))
    spoil(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    given = ("-m", "gptq", "-o", tmp_path / "out", "--samples", 4, "--seq-len", 16, "--data", tmp_path / "text.txt", "--probe", "none")
    status, output, error = run("compress", tmp_path / "model", *given)
    assert status == 2 and not output and says in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}


def test_generate_with_a_compressed_cache(run):
    asked = ("generate", "builtin:tiny-lm", "--prompt", "import os\n\ndef ", "--max-new-tokens", "12")
    plain, cached = run(*asked), run(*asked, "--cache", "kivi:bits=8,group_size=4,residual=4")
    assert cached[0] == 0 and cached[1] == plain[1]
    status, _, error = run("generate", "builtin:tiny-lm", "--prompt", "def ", "--cache", "kivi:bits=12")
    assert status == 2 and "bits=12 is out of range" in error
    status, _, error = run("generate", "builtin:tiny-lm", "--prompt", "def ", "--cache", "kivy")
    assert status == 2 and "did you mean 'kivi'" in error


def test_tables_of_a_cache_are_calibrated_and_read(run, tmp_path):
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 60)
    tables = tmp_path / "tables.safetensors"
    given = ("--data", tmp_path / "text.txt", "--samples", 2, "--seq-len", 32)
    asked = ("generate", "builtin:tiny-lm", "--prompt", "import os\n\ndef ", "--max-new-tokens", 6)
    method = "kvquant:bits=8,levels=uniform"
    status, output, _ = run("calibrate", "builtin:tiny-lm", "-m", method, "-o", tables, "--json", *given)
    stored = 8 * (2 * (512 + 1020) + 512)  # of each layer two sets of levels and edges, and the ranges of 128 channels
    assert status == 0 and json.loads(output) == {"file": str(tables), "method": "kvquant", "layers": 8, "bytes": stored}
    written = run(*asked, "--cache", method, "--cache-tables", tables)
    assert written[0] == 0 and written[1].startswith("import os")
    for arguments, says in (
        ((*asked, "--cache", "kvquant:bits=3", "--cache-tables", tables), "bits=3 is asked for"),
        ((*asked, "--cache", "kvquant"), "fewbits calibrate MODEL -m kvquant -o FILE"),
        ((*asked, "--cache", "kivi", "--cache-tables", tables), "kivi reads no tables"),
        ((*asked, "--cache-tables", tables), "--cache METHOD would be right"),
        (("calibrate", "builtin:tiny-lm", "-m", "kivi", "-o", tables, *given), "nothing to calibrate"),
        (("calibrate", "builtin:tiny-lm", "-m", "kvquant:bit=3", "-o", tables, *given), "did you mean 'bits'"),
        (("calibrate", "builtin:tiny-lm", "-m", "kvquant", "-o", tmp_path / "none" / "x", *given), "cannot be written"),
        (("calibrate", "builtin:tiny-lm", "-m", "kvquant", *given), "--output"),
    ):
        status, output, error = run(*arguments)
        assert status == 2 and not output and says in error and len(error.strip().splitlines()) == 1
