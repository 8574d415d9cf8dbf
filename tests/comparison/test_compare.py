import json

import pytest

import fewbits
from fewbits.comparison.configuration import read_configurations
from fewbits.comparison.samples import Samples
from fewbits.core.config import configure, read_spec
from fewbits.core.errors import InputError
from fewbits.core.record import schema
from fewbits.core.registry import get_method
from fewbits.pipeline.feed import StreamOptions

METHODS = ["rtn:bits=3", "gptq:bits=3", "lord:share=0.2", "smoothquant"]
SILENT = fewbits.CompareSettings(samples=Samples(tokens=0), noise_windows=0)
SAMPLES = Samples(("def add(a, b):",), 4)


@pytest.fixture(scope="module")
def compared(first_blocks, texts, tmp_path_factory):
    seen, held = texts
    output = tmp_path_factory.mktemp("compared") / "out"
    settings = fewbits.CompareSettings(samples=SAMPLES, noise_windows=4)
    return output, fewbits.compare(first_blocks, METHODS, output, calibration=seen, text=held, settings=settings)


@pytest.mark.parametrize("name", METHODS)
def test_the_numbers_are_those_of_compress_and_evaluate(compared, first_blocks, texts, tmp_path, name):
    seen, held = texts
    method, values = read_spec(name)
    made = fewbits.compress(first_blocks, configure(get_method(method), values), tmp_path / "out", calibration=seen, probe=None)
    alone = fewbits.evaluate(tmp_path / "out", reference=first_blocks, text=held, streamed=True)["results"]
    row = next(one for one in compared[1]["results"]["configurations"] if one["name"] == name)
    assert row["bits_per_weight"] == made["results"]["bits_per_weight"]
    for key in ("kl_mean", "kl_p99", "perplexity", "delta_loss", "top1_agreement"):
        assert row[key] == pytest.approx(alone[key], rel=1e-5, abs=1e-7), key
    weights = made["results"]["compressed_weights"]
    assert {role: round(bits * weights) for role, bits in row["bits"].items()} == made["results"]["bits"]


def test_the_record_says_what_the_folder_holds(compared):
    import jsonschema

    output, record = compared
    jsonschema.validate(record, schema())
    written = json.loads((output / "compare.json").read_text())
    assert written["results"]["configurations"] == record["results"]["configurations"] and "timing" not in written["results"]
    assert sorted(path.name.partition("-")[0] for path in (output / "runs").iterdir()) == [
        "dense",
        "gptq_bits=3",
        "lord_share=0.2",
        "rtn_bits=3",
        "smoothquant",
    ]
    assert all(name in (output / "table.md").read_text() for name in METHODS)
    assert len((output / "table.csv").read_text().splitlines()) == 1 + len(METHODS)
    assert (output / "report.html").stat().st_size < 6e6
    assert not list((output / "work").glob("*"))
    results = record["results"]
    assert 0 < results["noise"]["floor"] < 0.1 and results["dense"]["samples"] != [""]
    assert all(set(timing) >= {"seconds", "peak_memory_bytes", "tokens_per_second"} for timing in results["timing"].values())


def test_errors_of_all_methods_are_measured_with_one_moment(compared, first_blocks, texts, tmp_path):
    """Rounding to nearest sees no inputs; its layers' errors are those of the dense inputs on the text that is measured on."""
    from fewbits.models.source import open_model
    from fewbits.pipeline.dense_pass import DensePass
    from fewbits.statistics.hessian import Hessian

    source = open_model(first_blocks)
    dense = DensePass(source, texts[1].windows(source.tokenizer()), None, tmp_path)
    dense.gather([Hessian])
    method = configure(get_method("rtn"), {"bits": 3})
    row = compared[1]["results"]["configurations"][0]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight, moment = source.parameter(f"{name}.weight").float(), dense.moment(name)
        lost = weight - method.compress(weight, None).decode()
        expected = float(((lost @ moment) * lost).sum() / ((weight @ moment) * weight).sum())
        assert row["layers"][name]["relative_error"] == pytest.approx(expected, rel=1e-4)


def test_verdicts_frontier_and_pairs_agree(compared):
    results = compared[1]["results"]
    rows = {row["name"]: row for row in results["configurations"]}
    assert results["baseline"] == "rtn:bits=3" and rows["rtn:bits=3"]["verdict"] is None
    for row in rows.values():
        if row["name"] != "rtn:bits=3":
            (low, high), floor = row["verdict"]["interval"], results["noise"]["floor"]
            expected = "better" if high < -floor else "worse" if low > floor else "not distinguishable"
            assert row["verdict"]["said"] == expected and low < row["verdict"]["difference"] < high
    assert rows["lord:share=0.2"]["verdict"]["said"] == "worse"
    for one in rows:
        for other in rows.keys() - {one}:
            assert results["pairs"][one][other]["difference"] == pytest.approx(rows[one]["loss"] - rows[other]["loss"], abs=1e-5)
    assert rows["gptq:bits=3"]["frontier"] and not rows["rtn:bits=3"]["frontier"]  # as many bits, and a smaller divergence


def test_a_second_run_makes_only_what_is_missing(compared, first_blocks, texts):
    output, record = compared
    before = {path: path.stat().st_mtime_ns for path in (output / "runs").glob("*/*")}
    said = []
    seen, held = texts
    settings = fewbits.CompareSettings(samples=SAMPLES, noise_windows=4)
    again = fewbits.compare(
        first_blocks, [*METHODS, "hqq"], output, calibration=seen, text=held, settings=settings, report=lambda what, row: said.append(row)
    )
    assert again["results"]["configurations"][:3] == [
        row | {"frontier": new["frontier"]}
        for row, new in zip(record["results"]["configurations"][:3], again["results"]["configurations"][:3], strict=True)
    ]
    after = {path: path.stat().st_mtime_ns for path in (output / "runs").glob("*/*")}
    assert {path: after[path] for path in before} == before and {
        path.parent.name.partition("-")[0] for path in after.keys() - before.keys()
    } == {"hqq"}
    assert [row["name"] for row in said if row] == [*METHODS, "hqq"]


def test_repeats_draw_other_calibration_text_for_methods_that_look_at_it(first_blocks, texts, tmp_path):
    seen, held = texts
    settings = fewbits.CompareSettings(repeats=2, samples=Samples(tokens=0), noise_windows=0, baseline="gptq:bits=3", bits=(3,))
    options = StreamOptions(inputs="original")
    record = fewbits.compare(
        first_blocks, ["rtn", "gptq"], tmp_path / "out", calibration=seen, text=held, settings=settings, options=options
    )
    rtn, gptq = record["results"]["configurations"]
    assert rtn["seeds"] == [None] and gptq["seeds"] == [0, 1] and gptq["perplexities"][0] != gptq["perplexities"][1]
    assert gptq["inputs"] == "original" and rtn["inputs"] is None and gptq["samples"] == []
    low, high = rtn["verdict"]["interval"]
    assert low < rtn["verdict"]["difference"] < high and record["results"]["noise"] is None
    assert len(list((tmp_path / "out" / "runs").glob("gptq*"))) == 2


def test_bits_go_to_methods_that_have_them_and_do_not_set_them():
    found = read_configurations(["rtn", "gptq:bits=3,group_size=64", "lord"], (2, 4))
    assert [one.name for one in found] == ["rtn:bits=2", "rtn:bits=4", "gptq:bits=3,group_size=64", "lord"]
    assert found[2].arguments() == ["-m", "gptq", "--set", "bits=3", "--set", "group_size=64"] and found[1].plan.method.bits == 4


def test_a_recipe_is_a_configuration(tmp_path):
    (tmp_path / "mixed.toml").write_text('keep = ["*.0.*"]\n[method]\nname = "rtn"\nbits = 3\n')
    (one,) = read_configurations([str(tmp_path / "mixed.toml")], (2,))
    assert one.plan.keep == ("*.0.*",) and one.arguments() == ["--recipe", str(tmp_path / "mixed.toml")] and "/" not in one.slug


@pytest.mark.parametrize(
    ("methods", "changes", "says"),
    [
        ([], {}, "nothing to compare"),
        (["gtpq"], {}, "did you mean 'gptq'"),
        (["rtn:bit=3"], {}, "did you mean 'bits'"),
        (["rtn", "rtn"], {}, "asked for twice"),
        (["kivi"], {}, "compresses no linear layers"),
        (["udfc"], {}, "compresses no linear layers"),
        (["rtn"], {"baseline": "gptq"}, "the baseline 'gptq' is not compared"),
        (["none.toml"], {}, "cannot be read"),
    ],
)
def test_wrong_input_is_said_before_any_work(first_blocks, texts, tmp_path, methods, changes, says):
    with pytest.raises(InputError, match=says):
        fewbits.compare(first_blocks, methods, tmp_path / "out", text=texts[1], settings=fewbits.CompareSettings(**changes))
    assert not (tmp_path / "out").exists()


def test_folders_and_numbers_that_cannot_be(first_blocks, texts, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="holds no comparison"):
        fewbits.compare(first_blocks, ["rtn"], tmp_path, text=texts[1], settings=SILENT)
    assert (tmp_path / "mine.txt").read_text() == "kept"
    with pytest.raises(InputError, match="repeats=0"):
        fewbits.CompareSettings(repeats=0)
    with pytest.raises(InputError, match="0 or more"):
        Samples(("",), 3)
    with pytest.raises(InputError, match="is an encoder"):
        fewbits.compare("builtin:minilm", ["rtn"], tmp_path / "out", text=texts[1], settings=SILENT)
