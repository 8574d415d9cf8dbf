"""Calibrated tables of caches: made, written, found again, and refused where they do not fit."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits import caches
from fewbits.core.errors import InputError
from fewbits.methods.kvcache.kvquant import Kvquant
from fewbits.models.cache_tables import read_tables

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
WINDOWS = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(0))
FAST = {"levels": "uniform"}  # no gradients, no clustering: what is tested here is the file


def small(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}, num_hidden_layers=2)).eval()


@pytest.fixture
def written(tmp_path):
    """A model, the file of its tables, and the tables."""
    model, path = small(), tmp_path / "tables.safetensors"
    return model, path, caches.calibrate(model, "kvquant", FAST, text=WINDOWS, output=path, bits=2)


def test_tables_come_back_from_their_file_bit_for_bit(written):
    model, path, tables = written
    assert os.listdir(path.parent) == [path.name]
    found = read_tables(path, Kvquant(bits=2, levels="uniform"), model)
    assert found.keys() == tables.keys() == {0, 1}
    for layer, own in tables.items():
        assert own.keys() == found[layer].keys()
        assert all(torch.equal(own[name], found[layer][name]) and own[name].dtype == found[layer][name].dtype for name in own)
    for given in (path, str(path), tables):
        layer = caches.open(model, "kvquant", FAST, tables=given, bits=2).compressed()[1]
        assert torch.equal(layer.tables["keys.scales"], tables[1]["keys.scales"])
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["fewbits_cache"])
    assert described["method"] == "kvquant" and described["settings"]["bits"] == 2 and described["model"]["hidden_size"] == 32


def test_tables_in_the_folder_of_the_model_are_found(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with pytest.raises(InputError, match="fewbits calibrate MODEL -m kvquant -o FILE makes them"):
        caches.open(model, "kvquant")
    caches.calibrate(model, "kvquant", FAST, text=WINDOWS, output=tmp_path / "cache-kvquant.safetensors")
    assert caches.open(model, "kvquant", FAST).compressed()[0].tables
    with pytest.raises(InputError, match="none were given"):
        caches.open(small(), "kvquant", FAST)  # came from no folder


def test_fields_that_tables_do_not_depend_on_may_differ(written):
    model, path, _ = written
    assert caches.open(model, "kvquant", FAST, tables=path, bits=2, residual=8, capped_keys=True).method.residual == 8


def test_what_was_made_for_something_else_is_refused_in_one_line(written, tmp_path):
    model, path, tables = written
    for given, model_given, says in (
        ({"bits": 3, **FAST}, model, "calibrated for bits=2, and bits=3 is asked for; calibrate anew"),
        ({"bits": 2, **FAST}, small(hidden_size=64), "for head_dim=8, and head_dim=16 is this model's"),
        ({"bits": 2, **FAST}, small(num_key_value_heads=4), "num_key_value_heads=2, and num_key_value_heads=4"),
    ):
        with pytest.raises(InputError, match=says) as error:
            caches.open(model_given, "kvquant", given, tables=path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="hold nothing for layer 1"):
        caches.open(model, "kvquant", tables={0: tables[0]})
    with pytest.raises(InputError, match="kivi reads no tables"):
        caches.open(model, "kivi", tables=path)
    with pytest.raises(InputError, match="is no file; fewbits calibrate MODEL -m kvquant"):
        caches.open(model, "kvquant", tables=tmp_path / "none")
    other = tmp_path / "other.safetensors"
    save_file(load_file(path), other)
    with pytest.raises(InputError, match="holds no tables of a cache method"):
        caches.open(model, "kvquant", tables=other)
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["fewbits_cache"]) | {"method": "another"}
    save_file(load_file(path), other, metadata={"fewbits_cache": json.dumps(described)})
    with pytest.raises(InputError, match="holds tables of another, not of kvquant"):
        caches.open(model, "kvquant", FAST, tables=other, bits=2)
    other.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        caches.open(model, "kvquant", tables=other)


def test_what_cannot_be_calibrated_is_said_before_anything_runs(tmp_path):
    model = small()
    with pytest.raises(InputError, match="kivi reads no tables, so there is nothing to calibrate"):
        caches.calibrate(model, "kivi", text=WINDOWS)
    with pytest.raises(InputError, match="'gptq' does not write caches"):
        caches.calibrate(model, "gptq", text=WINDOWS)
    with pytest.raises(InputError, match="came from no folder with a tokenizer"):
        caches.calibrate(model, "kvquant")
    with pytest.raises(InputError, match="a file in a folder that is there would be right"):
        caches.calibrate(model, "kvquant", text=WINDOWS, output=tmp_path / "none" / "file")
    with pytest.raises(InputError, match="bits: fields are taken"):
        caches.calibrate(model, Kvquant(), text=WINDOWS, bits=3)


def test_a_file_that_cannot_be_finished_leaves_the_old_one(written, monkeypatch):
    model, path, _ = written
    before = path.read_bytes()

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fewbits.models.cache_tables.save_file", full)
    with pytest.raises(InputError, match="No space left on device"):
        caches.calibrate(model, dataclasses.replace(Kvquant(**FAST), bits=4), text=WINDOWS, output=path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_text_is_read_with_the_tokenizer_of_the_models_folder():
    model = fewbits.load("builtin:tiny-lm")
    sample = fewbits.TextSample("builtin:heldout", 1, 16)
    seen = []
    tables = caches.calibrate(model, "kvquant", FAST, text=sample, report=lambda *said: seen.append(said))
    assert len(tables) == 8 and tables[0]["keys.scales"].shape == (128,) and seen == [(1, 1, "window 1 of 1")]
