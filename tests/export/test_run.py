"""Exports as a whole: asked before, written beside, audited after."""

import errno
import signal
import subprocess
import sys

import pytest
import torch

from fewbits import TextSample, api
from fewbits.core.errors import FewbitsError, InputError
from fewbits.core.record import schema
from fewbits.core.tensor import CompressedTensor
from fewbits.export.run import audit, export, holders
from fewbits.export.target import Target, get_target, list_targets
from fewbits.export.targets.awq import Awq
from fewbits.export.targets.dense import Dense
from fewbits.export.targets.gptq import Gptq
from fewbits.formats.diagonal import DiagonalScale
from fewbits.layers.linear import StoredLinear
from fewbits.methods.weights.awq import Awq as AwqMethod
from fewbits.methods.weights.gptq import Gptq as GptqMethod
from fewbits.pipeline.plan import Plan

LAYER = "model.layers.1.mlp.up_proj"


def scaled_in_one(uniform):
    """4-bit groups of 16 everywhere, and one layer whose inputs are scaled."""

    def make(name, weight):
        stored = uniform(4, 16, symmetric=True)(name, weight)
        scale = DiagonalScale(torch.linspace(0.5, 2, weight.shape[1]))
        return StoredLinear(CompressedTensor(stored.weight.terms, (scale,))) if name == LAYER else stored

    return make


def test_formats_are_found_by_their_files_and_typos_get_a_suggestion():
    assert {"awq", "compressed-tensors", "dense", "gptq"} <= set(list_targets())
    assert all(get_target(name).readers and get_target(name).name() == name for name in list_targets())
    assert get_target("compressed_tensors:bits=3").bits == 3
    with pytest.raises(InputError, match=r"no format is called 'gtpq'; did you mean 'gptq'\?"):
        get_target("gtpq")
    with pytest.raises(InputError, match=r"gptq has no field 'group'; did you mean 'group_size'\?"):
        get_target("gptq:group=16")


def test_a_layer_that_does_not_fit_is_named_with_the_formats_that_hold_the_model(compressed, uniform, tmp_path):
    folder = compressed(scaled_in_one(uniform))
    with pytest.raises(InputError) as said:
        export(folder, Gptq(), tmp_path / "out")
    assert str(said.value).startswith(f"gptq cannot hold {LAYER}: a diagonal_scale of its inputs has no place there; dense")
    assert str(said.value).endswith("can hold the whole model, or --requantize")
    assert not (tmp_path / "out").exists() and "dense" in holders(folder) and "gptq" not in holders(folder)


@pytest.mark.parametrize(
    ("target", "most"),
    [(Gptq(bits=8, group_size=16), 1e-4), (Awq(group_size=16), 0.02), (get_target("compressed-tensors:group_size=16"), 0.02)],
)
def test_only_what_does_not_fit_is_requantized_and_its_loss_is_reported(target, most, compressed, uniform, tmp_path):
    folder = compressed(scaled_in_one(uniform))
    record = api.export(folder, target, tmp_path / "out", requantize=True)
    before, after = api.load(folder), api.load(tmp_path / "out")
    ((name, loss),) = record["results"]["requantized"].items()
    assert name == LAYER and record["results"]["reasons"] == {LAYER: "a diagonal_scale of its inputs has no place there"}
    old, new = before.get_submodule(LAYER).weight, after.get_submodule(LAYER).weight
    assert loss == pytest.approx(float((new - old).square().sum() / old.square().sum()), rel=1e-5)
    assert 0 < loss < most
    assert torch.equal(before.get_submodule("model.layers.0.mlp.up_proj").weight, after.get_submodule("model.layers.0.mlp.up_proj").weight)


def test_the_record_says_what_was_written(compressed, uniform, tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    record = api.export(compressed(uniform(4, 16, symmetric=True)), "gptq", tmp_path / "out")
    jsonschema.validate(record, schema())
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert record["results"]["files"] == files and record["results"]["file_bytes"] == sum(files.values())
    assert record["results"]["layers"] == 14 and record["settings"]["to"] == "gptq"
    assert record["settings"]["fields"]["checkpoint_format"] == "gptq"


def test_offsets_go_into_biases_and_need_them(compressed, uniform, tmp_path):
    def make(name, weight):
        stored = uniform(4, 16, symmetric=True)(name, weight)
        return StoredLinear(stored.weight, None, torch.linspace(-1, 1, len(weight)) if "self_attn" in name else None)

    folder = compressed(make)
    export(folder, Gptq(), tmp_path / "out")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(api.load(tmp_path / "out")(ids).logits, api.load(folder)(ids).logits)

    def without_bias(name, weight):
        return StoredLinear(make(name, weight).weight, None, torch.ones(len(weight)))

    with pytest.raises(InputError, match=r"mlp\.\S+: an offset is added to its outputs, and the model's layer has no bias"):
        export(compressed(without_bias, name="second"), Gptq(), tmp_path / "third")


def test_wrong_folders_and_taken_outputs_are_refused(llama, compressed, uniform, tmp_path):
    with pytest.raises(InputError, match="is no folder that fewbits compressed"):
        export(llama, Dense(), tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    folder = compressed(uniform(4, 16))
    with pytest.raises(InputError, match="taken exists and is not empty"):
        export(folder, Dense(), tmp_path / "taken")
    (tmp_path / "empty").mkdir()
    export(folder, Dense(), tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


class Broken(Dense):
    """Fails while writing, in a way that a test chooses."""

    def __init__(self, error):
        super().__init__()
        object.__setattr__(self, "error", error)

    def write(self, contents, destination):
        (destination / "half").write_text("half")
        raise self.error


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InputError, "the disk is full while writing"),
        (RuntimeError("broken"), RuntimeError, "broken"),
    ],
)
def test_nothing_is_left_of_a_failed_export(error, raised, said, compressed, uniform, tmp_path):
    folder = compressed(uniform(4, 16))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(raised, match=said):
        export(folder, Broken(error), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_what_a_killed_export_left_is_written_over(compressed, uniform, tmp_path):
    folder = compressed(uniform(4, 16, symmetric=True))
    script = f"""
import os, signal
from pathlib import Path
from fewbits.export import run
from fewbits.export.targets.gptq import Gptq
run.audit = lambda tensors: os.kill(os.getpid(), signal.SIGKILL)
run.export(Path({str(folder)!r}), Gptq(), Path({str(tmp_path / "out")!r}))
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial/config.json").is_file()
    (tmp_path / "out.partial" / "stale").touch()
    export(folder, Gptq(), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out/stale").exists()


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.empty(0), "was written empty"),
        (torch.empty(2, device="meta"), "was written without data"),
        (torch.tensor([1.0, torch.nan]), "values that are not finite"),
        (torch.tensor([1.0, torch.inf]).half(), "values that are not finite"),
        (torch.tensor([127], dtype=torch.uint8).view(torch.float8_e4m3fn), "values that are not finite"),
    ],
)
def test_the_audit_names_what_is_wrong(tensor, said):
    with pytest.raises(FewbitsError, match=said):
        audit([("good", torch.ones(1)), ("bad", tensor)])
    assert audit([("good", torch.ones(1, dtype=torch.int32))]) is None


def test_every_export_is_audited(compressed, uniform, tmp_path, monkeypatch):
    def poisoned(self, contents):
        yield from ((name, tensor * torch.nan if "norm" in name else tensor) for name, tensor in contents.dense())

    monkeypatch.setattr(Dense, "_separate", poisoned)
    with pytest.raises(FewbitsError, match=r"norm.*not finite"):
        export(compressed(uniform(4, 16)), Dense(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Forgetful(Gptq):
    """Writes zero points as the other layout has them, or one layer less."""

    def __init__(self, what):
        super().__init__()
        object.__setattr__(self, "what", what)

    def _tensors(self, contents, described):
        for name, tensor in super()._tensors(contents, described):
            if self.what == "zero points" and name == f"{LAYER}.qzeros":
                yield name, tensor + 0x11111111
            elif self.what != "layer" or not name.startswith(LAYER):
                yield name, tensor


@pytest.mark.parametrize(("what", "said"), [("zero points", f"{LAYER} does not read back"), ("layer", f"{LAYER} did not read back")])
def test_what_does_not_read_back_is_a_failure_of_ours(what, said, compressed, uniform, tmp_path):
    folder = compressed(uniform(4, 16, symmetric=True))
    with pytest.raises(FewbitsError, match=said):
        export(folder, Forgetful(what), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


class Single(Target):
    """One file."""

    readers = "a test"
    single_file = True

    def refuses(self, stored):
        return None

    def write(self, contents, destination):
        destination.write_text("whole")

    def written(self, destination):
        assert destination.name == "model.bin.partial"
        return [("one", torch.ones(1))]


def test_a_format_of_one_file_is_written_beside_and_renamed(compressed, uniform, tmp_path):
    folder = compressed(uniform(4, 16))
    made = export(folder, Single(), tmp_path / "new" / "model.bin")
    assert made.files == {"model.bin": 5} and [path.name for path in (tmp_path / "new").iterdir()] == ["model.bin"]
    with pytest.raises(InputError, match="exists and is not empty"):
        export(folder, Single(), tmp_path / "new" / "model.bin")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"is a folder, and .* is one file"):
        export(folder, Single(), tmp_path / "folder")


@pytest.mark.slow
def test_awq_fits_where_the_layers_that_keep_their_scale_have_another_method(first_blocks, tmp_path):
    text = TextSample("builtin:calibration", 8, 64)
    plan = Plan(AwqMethod(group_size=64), overrides=(("*.o_proj", GptqMethod(group_size=64)), ("*.down_proj", GptqMethod(group_size=64))))
    api.compress(first_blocks, plan, tmp_path / "compressed", calibration=text, probe=None)
    made = api.export(tmp_path / "compressed", "awq", tmp_path / "out")
    ids = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(api.load(tmp_path / "out")(ids).logits, api.load(tmp_path / "compressed")(ids).logits)
    assert made["results"]["requantized"] == {}
