"""Models that were compressed before stand beside what is compressed now."""

import pytest

import fewbits
from fewbits.api import export
from fewbits.comparison.configuration import read_configurations
from fewbits.comparison.samples import Samples
from fewbits.core.config import configure
from fewbits.core.errors import InputError
from fewbits.core.registry import get_method
from fewbits.reports.commands import commands

SETTINGS = fewbits.CompareSettings(samples=Samples(("def f",), 3), noise_windows=0)


@pytest.fixture(scope="module")
def made(first_blocks, texts, tmp_path_factory):
    """A folder of ours and the same as others' gptq folder, with what a comparison says of them and of the method itself."""
    folder = tmp_path_factory.mktemp("published")
    seen, held = texts
    method = configure(get_method("gptq"), {"bits": 4, "group_size": 32})
    fewbits.compress(first_blocks, method, folder / "ours", calibration=seen, probe=None)
    export(folder / "ours", "gptq", folder / "theirs")
    names = [f"{folder}/ours", f"{folder}/theirs", "gptq:bits=4,group_size=32"]
    record = fewbits.compare(first_blocks, names, folder / "out", calibration=seen, text=held, settings=SETTINGS)
    return folder, names, record


def test_the_numbers_are_those_of_the_method_that_made_them(made):
    _, names, record = made
    ours, theirs, method = record["results"]["configurations"]
    assert [row["name"] for row in (ours, theirs, method)] == names and method["family"] == "weights"
    assert (ours["family"], ours["method"]) == ("published", names[0])
    assert ours["bits_per_weight"] == method["bits_per_weight"] and ours["bits"] == method["bits"]
    for key in ("kl_mean", "perplexity", "delta_loss"):
        assert ours[key] == pytest.approx(method[key], rel=1e-4, abs=1e-6)
        assert theirs[key] == pytest.approx(ours[key], rel=1e-3, abs=1e-5)
    errors = {name: layer["relative_error"] for name, layer in method["layers"].items()}
    assert {name: layer["relative_error"] for name, layer in ours["layers"].items()} == pytest.approx(errors, rel=1e-3)
    assert ours["kept"].keys() == set() and ours["samples"] == method["samples"]
    assert "comparison" in commands(record)["all"] and len(commands(record)["single"][names[1]]) == 1


def test_they_are_not_measured_again(made, first_blocks, texts, monkeypatch):
    folder, names, record = made
    monkeypatch.setattr("fewbits.comparison.job.run_task", lambda *_: pytest.fail("measured again"))
    again = fewbits.compare(first_blocks, names[:2], folder / "out", calibration=texts[0], text=texts[1], settings=SETTINGS)
    assert [row["kl_mean"] for row in again["results"]["configurations"]] == [
        row["kl_mean"] for row in record["results"]["configurations"][:2]
    ]


def test_what_is_no_compressed_form_of_the_model_is_named(first_blocks, texts, tmp_path, small_model):
    folder = small_model(3)
    with pytest.raises(InputError, match="model is no compressed model; a folder that compress or export wrote"):
        read_configurations([f"{folder}/model"])
    with pytest.raises(InputError, match="nothing is not there"):
        read_configurations([f"{tmp_path}/nothing"])
    with pytest.raises(InputError, match=r"gguf is not there"):
        read_configurations(["a.gguf"])
    fewbits.compress(folder / "model", configure(get_method("rtn"), {}), tmp_path / "other", calibration=texts[0], probe=None)
    with pytest.raises(InputError, match=r"compressed layer 'model.layers.0.* is not one of"):
        fewbits.compare(first_blocks, [f"{tmp_path}/other"], tmp_path / "out", calibration=texts[0], text=texts[1], settings=SETTINGS)
