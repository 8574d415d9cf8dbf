import json
import sys
from types import SimpleNamespace

import pytest

from fewbits.core.errors import InputError
from fewbits.data.standard_library import CALIBRATION_MODULES, HELDOUT_MODULES
from fewbits.data.text import TextSample, load_text, token_windows
from fewbits.models.source import open_model


class Letters:
    """One token a character; 0 ends a document."""

    eos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}


def test_windows_follow_each_other_and_documents_are_marked():
    windows = token_windows(Letters(), ["abc", "de"], length=3, count=9)
    assert windows.tolist() == [[0, 97, 98], [99, 0, 100]]


def test_a_seed_draws_distinct_windows_again_and_again():
    text = ["".join(chr(65 + i % 50) for i in range(400))]
    first, again, other = (token_windows(Letters(), text, 7, 20, seed=seed) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    assert len({tuple(row) for row in first.tolist()}) == 20


def test_files_are_read_and_bad_ones_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two"}))
    assert load_text(str(tmp_path / "a.jsonl")) == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"words": 1}')
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "d.txt").write_bytes(b"ab\xff")
    for name, says in [("b.jsonl", "line 2"), ("c.txt", "holds no text"), ("d.txt", "byte 2"), ("e.txt", "is not a file")]:
        with pytest.raises(InputError, match=says):
            load_text(str(tmp_path / name))
    with pytest.raises(InputError, match="builtin:heldout"):
        load_text("builtin:held")


def test_parquet_files_are_read_and_bad_ones_named(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "other": [1, 2, 3]}), tmp_path / "a.parquet")
    assert load_text(str(tmp_path / "a.parquet")) == ["one", "two"]
    parquet.write_table(pyarrow.table({"words": ["one"]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:40])
    for name, says in [("b.parquet", 'has the columns words; one called "text"'), ("c.parquet", "cannot be read as parquet")]:
        with pytest.raises(InputError, match=says):
            load_text(str(tmp_path / name))


def test_a_data_set_of_the_hub_is_asked_for_by_name_and_split(monkeypatch):
    asked = []

    class Rows(dict):
        column_names = ("text",)

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        if name == "owner/gone":
            raise ConnectionError("no route\nand a long trace")
        return Rows(text=["a", "", "b"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_text("owner/name") == load_text("owner/name:test") == load_text("owner/name/raw-v1:validation[:10%]") == ["a", "", "b"]
    assert asked == [("owner/name", None, "train"), ("owner/name", None, "test"), ("owner/name", "raw-v1", "validation[:10%]")]
    with pytest.raises(InputError, match=r"'owner/gone' is no file here, and the hub did not give it \(no route\)"):
        load_text("owner/gone")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'fewbits\[data\]'"):
        load_text("owner/name")
    with pytest.raises(InputError, match=r"'nowhere/text.txt' is not a file"):
        load_text("nowhere/text.txt")


def test_too_short_a_text_says_how_long_it_is():
    with pytest.raises(InputError, match="4 tokens, and one window takes 5"):
        token_windows(Letters(), ["abc"], length=5, count=1)


def test_what_is_held_out_is_not_calibrated_on():
    assert not set(HELDOUT_MODULES) & set(CALIBRATION_MODULES)
    heldout, calibration = load_text("builtin:heldout"), load_text("builtin:calibration")
    assert all(len(text) > 5000 for text in heldout) and not set(heldout) & set(calibration)


def test_separate_documents_are_padded_and_masked(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in ["a b", "one two three four", "", "x = 1\ny = 2\nz = 3"]))
    tokenizer = open_model("builtin:tiny-lm").tokenizer()
    tokens, mask = TextSample(str(file), 8, 6, separate=True).batch(tokenizer)
    assert tokens.shape == mask.shape and len(tokens) == 3 and tokens.shape[1] <= 6
    texts = {tokenizer.decode(row[real]) for row, real in zip(tokens, mask, strict=True)}
    assert "a b" in texts and bool(mask[:, :2].all()) and not bool(mask.all())
    assert TextSample("builtin:calibration", 2, 16).batch(tokenizer)[1] is None
