"""A paper's comparison measured again: the figures that methods carry, and the numbers beside them."""

import json
import math

import jsonschema
import pytest

import fewbits
from fewbits.comparison.compare import CompareSettings, compare
from fewbits.comparison.configuration import read_configurations
from fewbits.comparison.folder import Folder
from fewbits.comparison.samples import Samples
from fewbits.core.errors import InputError
from fewbits.core.published import share_removed
from fewbits.core.record import schema
from fewbits.reproduction import published, reproduce, reproducible


@pytest.mark.parametrize("name", reproducible())
def test_the_figures_are_of_the_method_and_of_others_that_are_here(name):
    figures = published(name)
    assert figures.own.spec.partition(":")[0] == name
    assert len(read_configurations(figures.specs)) == len(figures.specs) >= 2
    assert figures.specs[1] == figures.own.spec and not figures.specs[0].startswith(f"{name}:bits={figures.own.bits},")
    assert all(figures.dense < one.perplexity for one in (figures.own, *figures.rivals))
    assert figures.own.perplexity < figures.rival.perplexity, "a paper holds weaker results against its own"


def test_the_share_of_a_loss_that_is_removed():
    """By hand: nats over the dense model's are ln 2 and ln 4, half of them are gone."""
    assert share_removed(5.0, 20.0, 10.0) == pytest.approx(0.5)
    assert share_removed(5.0, 10.0, 20.0) == pytest.approx(-1.0)
    assert share_removed(5.0, 5.0, 6.0) is None


def test_the_numbers_are_those_of_a_comparison(first_blocks, texts, tmp_path):
    seen, held = texts
    record = reproduce("gptq", tmp_path / "rows" / "gptq.json", model=str(first_blocks), text=held, calibration=seen)
    jsonschema.validate(record, schema())
    assert json.loads((tmp_path / "rows" / "gptq.json").read_text()) == record and not list((tmp_path / "rows").glob("*.work"))
    settings = CompareSettings(noise_windows=0, samples=Samples(tokens=0))
    alone = compare(str(first_blocks), published("gptq").specs, tmp_path / "alone", calibration=seen, text=held, settings=settings)
    results = record["results"]
    rows = {row["name"]: row for row in alone["results"]["configurations"]}
    assert [row["perplexity"] for row in results["rows"]] == [rows[row["spec"]]["perplexity"] for row in results["rows"]]
    dense, (own, rival) = alone["results"]["dense"]["perplexity"], [row["perplexity"] for row in results["rows"]]
    assert results["dense"] == dense
    assert results["share_removed"]["here"] == share_removed(dense, rival, own)
    assert results["share_removed"]["paper"] == pytest.approx(1 - math.log(8.07 / 5.68) / math.log(25.54 / 5.68))
    said = " ".join(results["differs"])
    assert all(
        word in said
        for word in (str(first_blocks), "huggyllama/llama-7b", held.data, "windows: at most 12", "windows of 48 tokens", "6 windows")
    )


def test_a_run_that_was_stopped_goes_on(first_blocks, texts, tmp_path, monkeypatch):
    seen, held = texts
    output = tmp_path / "gptq.json"

    def stopped(what, row):
        if row is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce("gptq", output, model=str(first_blocks), text=held, calibration=seen, report=stopped)
    assert not output.exists()
    kept = [path.name for path in (tmp_path / "gptq.json.work" / "runs").iterdir()]
    assert any(name.startswith("rtn") for name in kept)
    written = []
    folder_keeps = Folder.keep_run
    monkeypatch.setattr(Folder, "keep_run", lambda self, run, *what: written.append(run.name) or folder_keeps(self, run, *what))
    reproduce("gptq", output, model=str(first_blocks), text=held, calibration=seen)
    assert written and not set(written) & set(kept), "what was measured is not measured again"
    assert output.is_file() and not (tmp_path / "gptq.json.work").exists()


def test_what_has_no_figures_or_no_model_is_said(tmp_path):
    with pytest.raises(InputError, match=r"hqq has no published perplexity here; one of .*squeezellm.* would be right"):
        reproduce("hqq", tmp_path / "hqq.json")
    with pytest.raises(InputError, match="did you mean 'gptq'"):
        reproduce("gptk", tmp_path / "gptk.json")
    with pytest.raises(InputError):
        reproduce("gptq", tmp_path / "gptq.json", model=str(tmp_path / "nothing"))
    assert not list(tmp_path.iterdir())


def test_it_is_part_of_the_package():
    assert fewbits.reproduce is reproduce
