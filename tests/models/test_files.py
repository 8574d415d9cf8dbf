"""Files that are read whole: the very numbers, in memory of their own."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fewbits import api
from fewbits.core.errors import InputError
from fewbits.export.checkpoint import write_checkpoint
from fewbits.export.stack import Stack
from fewbits.kernels import native
from fewbits.methods.weights.rtn import Rtn
from fewbits.models import conversion
from fewbits.models.files import WholeFile, open_file, read_tensor
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import compress_model

TENSORS = {
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 3),
    "bytes": torch.arange(251, dtype=torch.uint8),
    "halves": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).half(),
    "brain floats": torch.randn(7, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "flags": torch.tensor([True, False]),
    "large": torch.randint(256, (5 * 2**20 + 3,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)),
}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def test_every_tensor_is_read_as_it_was_written(file):
    whole = WholeFile(file)
    for name, tensor in TENSORS.items():
        found = whole.tensor(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and torch.equal(found, tensor), name
    whole.close()
    assert torch.equal(found, TENSORS[name])  # which keeps the file mapped


def test_what_is_not_there_or_cut_short_is_an_error(file, tmp_path):
    whole = WholeFile(file)
    with pytest.raises(InputError, match=r"does not hold the tensor 'other'.*copy it again"):
        whole.tensor("other")
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size - 5 * 2**20)
    with pytest.raises(InputError, match="ends inside the tensor 'large'; copy it again"):
        whole.tensor("large")
    whole.close()
    for broken in (b"", b"\xff" * 8, (10**9).to_bytes(8, "little") + b"{}"):
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(InputError, match="cannot be read as safetensors"):
            WholeFile(tmp_path / "broken")


def test_a_mapped_tensor_is_the_same(file):
    with open_file(file) as opened:
        assert all(torch.equal(read_tensor(opened, file, name), tensor) for name, tensor in TENSORS.items())


@pytest.fixture
def folder(learned, tmp_path):
    source = open_model(learned)
    summary = compress_model(source, Plan(Rtn(bits=4, group_size=16)), torch.zeros(1, 4, dtype=torch.int64), tmp_path / "work")
    write_checkpoint(tmp_path / "out", source, summary.layers, lambda _: ({}, ""), shard_bytes=30000)
    return tmp_path / "out"


def test_a_folder_of_ones_own_is_loaded_without_rules_of_other_layouts_and_files_are_opened_once(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda _: opened.append("rules"))
    monkeypatch.setattr("fewbits.models.source.WholeFile", lambda path: opened.append(path.name) or WholeFile(path))
    monkeypatch.setattr("fewbits.models.source.read_tensor", lambda *_: opened.append("tensor"))
    model = api.load(folder)
    shards = sorted(set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()))
    assert opened == shards and len(shards) > 1
    assert all(not tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.skipif(not native.available(), reason="without kernels tensors stay where they are")
def test_a_loaded_model_has_memory_of_its_own(folder):
    model = api.load(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for shard in folder.glob("*.safetensors"):
        with open(shard, "r+b") as stream:
            stream.write(bytes(shard.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_files_are_closed_where_loading_fails(folder, monkeypatch):
    closed, close = [], WholeFile.close
    monkeypatch.setattr(WholeFile, "close", lambda self: closed.append(self.path.name) or close(self))
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match="cut short"):
        api.load(folder)
    assert sorted(closed) == sorted(path.name for path in folder.glob("*.safetensors") if path != shard)


def test_of_a_stack_no_file_is_read_whole(folder, monkeypatch):
    """`memory` asks for a part, which is read tensor by tensor."""
    seen = []
    monkeypatch.setattr("fewbits.models.source.WholeFile", lambda path: seen.append(path))
    with pytest.raises(InputError, match="is no stack"):
        api.load(folder, memory="1MB")
    monkeypatch.setattr("fewbits.export.checkpoint.read_stack", lambda _: Stack((), (0,)))
    part = api.load(folder, memory="1MB")
    assert seen == [] and all(not tensor.is_meta for tensor in (*part.parameters(), *part.buffers()))
