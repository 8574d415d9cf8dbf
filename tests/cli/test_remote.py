"""Commands that read from object storage and write to it, for which fsspec's memory stands."""

import json

import pytest

from fewbits.core.remote import put_folder

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")


@pytest.mark.slow
def test_models_and_results_by_url(run, small_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, system = small_model(2), fsspec.filesystem("memory")
    system.store.clear()
    put_folder(root / "model", "memory://bucket/model")
    text = ("--data", root / "text.txt", "--samples", 3, "--seq-len", 16)
    method = ("-m", "rtn", "--set", "bits=3", "--set", "group_size=16", "--probe", "none")
    status, output, error = run("compress", "memory://bucket/model", *method, "-o", "memory://bucket/out", *text)
    assert status == 0 and "memory://bucket/out: " in output.replace("\n", ""), error
    held = ("--data", root / "held.txt", "--windows", 3, "--seq-len", 16, "--json")
    found = [json.loads(run("evaluate", place, *held)[1])["results"] for place in ("memory://bucket/out", "memory://bucket/model")]
    assert found[0]["bits_per_weight"] == pytest.approx(4.3, abs=0.3) and found[0]["perplexity"] != found[1]["perplexity"]
    status, _, error = run("compress", "memory://bucket/model", *method, "-o", "memory://bucket/out", *text)
    assert status == 2 and "'memory://bucket/out' holds files already" in error
    allocation = ("--budget", "5bpw", "-m", "rtn:group_size=16", "--options", "2,4,8", "--sensitivity", "output", *text)
    held = ("--heldout", root / "held.txt", "--windows", 3)
    status, _, error = run("allocate", "memory://bucket/model", *allocation, *held, "-o", "memory://bucket/recipe.toml")
    assert status == 0 and b'name = "rtn"' in system.cat_file("/bucket/recipe.toml"), error
    assert not list((tmp_path / "cache" / "fewbits" / "places").glob("*"))
