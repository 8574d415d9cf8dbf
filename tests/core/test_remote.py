"""Models, results and what nodes read of them in object storage, for which fsspec's memory stands."""

import pickle
import sys

import pytest

from fewbits.comparison.compare import CompareSettings, compare
from fewbits.comparison.folder import Folder
from fewbits.comparison.samples import Samples
from fewbits.core.errors import InputError
from fewbits.core.remote import fetch_folder, is_url, local_place, placed, put_folder
from fewbits.core.workers import ThisProcess
from fewbits.data.text import TextSample
from fewbits.models.source import open_model
from fewbits.pipeline.feed import StreamOptions

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """Object storage that is empty, and a cache of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def contents(folder):
    timed = ("timing.json", "report.html", "table.md", "table.csv")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name not in timed}


def stored(system, root):
    return {path.removeprefix(root): system.cat_file(path) for path in system.find(root)}


def test_places_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert is_url("s3://bucket/model") and not is_url("builtin:tiny-lm") and not is_url("owner/name") and not is_url(tmp_path)
    assert local_place("out") == local_place(local_place("out")) and local_place("s3://a/r.toml").name == "r.toml"
    assert local_place("s3://a/out").is_relative_to(tmp_path) and local_place("s3://a/out") != local_place("s3://b/out")


def test_a_model_is_fetched_once_and_again_when_it_has_changed(storage, learned, tmp_path):
    put_folder(learned, "memory://bucket/model")
    storage.pipe_file("/bucket/model/notes.bin", b"not of the model")
    source, here = open_model("memory://bucket/model"), open_model(learned)
    assert source.fingerprint() == here.fingerprint() and not (source.path / "notes.bin").exists()
    (source.path / "marked").touch()
    assert (open_model("memory://bucket/model/").path / "marked").exists()
    assert pickle.loads(pickle.dumps(source)).path == source.path
    storage.pipe_file("/bucket/model/generation_config.json", b"{}")
    assert open_model("memory://bucket/model").path != source.path


class OtherMachine:
    """Jobs are done where nothing of this machine's cache is, and sent as bytes."""

    def __init__(self, monkeypatch, cache):
        self.monkeypatch, self.cache, self.count = monkeypatch, cache, 0

    def map(self, function, jobs):
        for pair in jobs:
            sent, here = pickle.dumps((function, pair)), self.cache / "cache"
            self.monkeypatch.setenv("XDG_CACHE_HOME", str(self.cache / "other"))
            here.rename(self.cache / "away")
            function_there, there = pickle.loads(sent)
            done = pickle.dumps(function_there(*there))
            assert not here.exists()
            (self.cache / "away").rename(here)
            self.monkeypatch.setenv("XDG_CACHE_HOME", str(here))
            self.count += 1
            yield pickle.loads(done)


@pytest.mark.slow
def test_a_comparison_in_object_storage_is_that_of_a_folder(storage, small_model, tmp_path, monkeypatch):
    root = small_model(2)
    put_folder(root / "model", "memory://bucket/model")
    texts = {"calibration": TextSample(str(root / "text.txt"), 3, 16), "text": TextSample(str(root / "held.txt"), 3, 16)}
    settings = CompareSettings(samples=Samples(("def f",), 2), noise_windows=0)
    methods, url = ["rtn:bits=3,group_size=16", "gptq:bits=3,group_size=16"], "memory://bucket/comparison"

    def run(model, output, workers, methods=methods):
        return compare(model, methods, output, **texts, settings=settings, options=StreamOptions(workers=workers))

    run("memory://bucket/model", tmp_path / "here", ThisProcess())
    run("memory://bucket/model", url, workers := OtherMachine(monkeypatch, tmp_path))
    assert workers.count == 2
    files = stored(storage, "/bucket/comparison/")
    here = contents(tmp_path / "here")
    assert {name: files[name] for name in here if not name.startswith("shared/")} == {
        name: content for name, content in here.items() if not name.startswith("shared/")
    }
    assert "report.html" in files and all(files[name] == here[name] for name in files if name.startswith("shared/") and name in here)
    # Another machine begins with an empty cache: what is there is fetched and not made again.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "fresh"))
    run("memory://bucket/model", url, workers, [*methods, "rtn:bits=4,group_size=16"])
    assert workers.count == 3
    assert len({name.split("/")[1] for name in stored(storage, "/bucket/comparison/") if name.startswith("runs/")}) == 4


def test_a_run_that_was_kept_here_and_not_put_there_is_put_there_next_time(storage):
    folder = Folder("memory://bucket/comparison")
    run = folder.runs / "rtn-0123"
    run.mkdir()
    (run / "record.json").write_text("{}")
    assert not stored(storage, "/bucket/comparison/")
    Folder("memory://bucket/comparison")
    assert stored(storage, "/bucket/comparison/") == {"runs/rtn-0123/record.json": b"{}"}


def test_what_could_not_be_put_there_says_where_it_lies(storage, monkeypatch):
    monkeypatch.setattr(storage, "put_file", lambda here, there: (_ for _ in ()).throw(OSError("the bucket is full")))
    with pytest.raises(InputError, match=r"the bucket is full.*lies in .*: copy it there"), placed("memory://bucket/full", "a") as place:
        place.mkdir(parents=True)
        (place / "a").write_text("a")
    assert (place / "a").read_text() == "a"


def test_what_is_written_is_put_there_whole_and_last_its_mark(storage, tmp_path):
    order, put = [], storage.put_file
    storage.put_file = lambda here, there: (order.append(there), put(here, there))
    try:
        with placed("memory://bucket/out", "config.json") as place:
            (place / "deep").mkdir(parents=True)
            for name in ("config.json", "deep/model.safetensors", "z.txt"):
                (place / name).write_text(name)
    finally:
        del storage.put_file
    assert order == [f"/bucket/out/{name}" for name in ("deep/model.safetensors", "z.txt", "config.json")]
    assert stored(storage, "/bucket/out/") == {name: name.encode() for name in ("config.json", "deep/model.safetensors", "z.txt")}
    assert not place.parent.exists()
    with pytest.raises(InputError, match="holds files already"), placed("memory://bucket/out", "config.json"):
        pass
    with placed(tmp_path / "plain", "config.json") as place:
        assert place == tmp_path / "plain"
    with pytest.raises(ZeroDivisionError), placed("memory://bucket/failed", "config.json") as place:
        place.mkdir(parents=True)
        (place / "config.json").write_text("half")
        1 / 0  # noqa: B018
    assert not storage.exists("/bucket/failed")


def test_what_cannot_be_opened_is_named(storage, monkeypatch):
    with pytest.raises(InputError, match="'memory://bucket/none' holds no files of a model"):
        open_model("memory://bucket/none")
    with pytest.raises(InputError, match="'nosuch://bucket/model' cannot be opened"):
        open_model("nosuch://bucket/model")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(InputError, match=r"pip install 'fewbits\[ray\]'"):
        fetch_folder("memory://bucket/model")
