import functools
import runpy
import shutil
from pathlib import Path

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM

import fewbits
from fewbits.core.errors import InputError
from fewbits.core.method import BlockMethod, LayerMethod
from fewbits.core.record import schema
from fewbits.core.registry import get_method, list_methods
from fewbits.export import checkpoint
from fewbits.export import folder as files
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.rtn import Rtn
from fewbits.pipeline.stream import StreamOptions
from fewbits.statistics.hessian import Hessian

MODEL = "builtin:tiny-lm"
SMALL = fewbits.TextSample("builtin:calibration", 2, 32)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "rtn"
    record = fewbits.compress(MODEL, Rtn(bits=4, group_size=64), output, calibration=SMALL)
    return output, record


def test_the_folder_is_smaller_and_holds_what_was_counted(compressed):
    output, record = compressed
    counted = sum(record["results"]["bits"].values()) / 8
    dense = (4096 * 256 + 17 * 256) * 2  # embedding and norms, bf16
    assert counted + dense <= (output / "model.safetensors").stat().st_size < (counted + dense) * 1.02
    card, probe = (output / "README.md").read_text(), record["results"]["probe"]
    assert card.count("bits per weight") == 1 and f"KL divergence {probe['kl_mean']:.4f} nats" in card
    assert record["results"]["bits_per_weight"] == pytest.approx(4 + 20 / 64, abs=1e-3)
    size, results = (output / "model.safetensors").stat().st_size, record["results"]
    parameters = 4096 * 256 + 17 * 256 + results["compressed_weights"]
    assert results["file_bytes"] == size and results["parameters"] == parameters
    assert results["file_bits_per_weight"] == pytest.approx(8 * size / parameters) and results["dense_file_bytes"] > 2 * parameters
    assert (output / "generation_config.json").is_file() and (output / "tokenizer.json").is_file()
    assert not output.with_name("rtn.work").exists() and not output.with_name("rtn.partial").exists()


def test_a_loaded_model_computes_with_the_stored_terms(compressed):
    output, _ = compressed
    model, dense = fewbits.load(output), fewbits.load(MODEL)
    layers = dict(checkpoint.read_layers(output))
    for name, stored in layers.items():
        dense.get_submodule(name).weight.data = stored.weight.decode()
    tokens = torch.randint(4096, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)


def test_evaluation_and_generation_take_the_folder(compressed):
    output, _ = compressed
    results = fewbits.evaluate(output, reference=MODEL, text=fewbits.TextSample("builtin:heldout", 4, 64))["results"]
    assert 0 < results["kl_mean"] < 0.1 and results["bits_per_weight"] < 4.4
    assert fewbits.generate(output, "def ", max_new_tokens=5).startswith("def ")


def test_an_output_that_is_not_empty_is_refused_and_left_alone(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(InputError, match="is not empty"):
        fewbits.compress(MODEL, Rtn(), tmp_path, calibration=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_full_disk_ends_in_one_line_and_leaves_nothing_half_written(compressed, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    output, _ = compressed
    with pytest.raises(InputError, match="disk is full"):
        checkpoint.write_checkpoint(
            tmp_path / "new", fewbits.api.open_model(MODEL), lambda: checkpoint.read_layers(output), lambda folder: ({}, "")
        )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_saving_loses_no_finished_block(tmp_path, monkeypatch):
    full, seen = True, []
    save = files.save_file

    def save_file(*given, **named):
        if full:
            raise OSError(28, "No space left on device")
        save(*given, **named)

    monkeypatch.setattr(files, "save_file", save_file)
    options = StreamOptions(progress=lambda block, *_: seen.append(block))
    with pytest.raises(InputError, match="disk is full"):
        fewbits.compress(MODEL, Rtn(), tmp_path / "out", calibration=SMALL, options=options, probe=None)
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"] and set(seen) == set(range(8))
    full = False
    seen.clear()
    fewbits.compress(MODEL, Rtn(), tmp_path / "out", calibration=SMALL, options=options, probe=None)
    assert not seen and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_reads_back_otherwise_than_it_was_written_does_not_count(compressed, tmp_path, monkeypatch):
    save = files.save_file

    def one_bit_wrong(tensors, path, **named):
        name = next(name for name in tensors if name.endswith("scales"))
        save(tensors | {name: tensors[name].view(torch.int16).bitwise_xor(1).view(torch.float16)}, path, **named)

    monkeypatch.setattr(files, "save_file", one_bit_wrong)
    layers = functools.partial(checkpoint.read_layers, compressed[0])
    with pytest.raises(fewbits.FewbitsError, match=r"model\.layers\.0\..*scales.*does not read back"):
        checkpoint.write_checkpoint(tmp_path / "new", fewbits.api.open_model(MODEL), layers, lambda folder: ({}, ""))
    assert not list(tmp_path.iterdir())


def test_what_a_stopped_run_had_finished_is_recognized(compressed, tmp_path):
    """Killed after the folder was renamed: the same command only tidies up; another one is refused."""
    output, work = tmp_path / "out", tmp_path / "out.work"
    shutil.copytree(compressed[0], output)
    work.mkdir()
    with pytest.raises(InputError, match="is not empty"):
        fewbits.compress(MODEL, Rtn(bits=3, group_size=64), output, calibration=SMALL)
    assert work.exists()
    assert fewbits.compress(MODEL, Rtn(bits=4, group_size=64), output, calibration=SMALL) == checkpoint.read_record(output)
    assert not work.exists()


def test_a_damaged_folder_is_named(compressed, tmp_path):
    shutil.copytree(compressed[0], tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        fewbits.load(tmp_path / "cut")
    (tmp_path / "cut" / "fewbits.json").write_text("{")
    with pytest.raises(InputError, match=r"fewbits\.json cannot be read"):
        checkpoint.read_record(tmp_path / "cut")


def test_transformers_loads_the_folder_by_itself(compressed):
    output, _ = compressed
    tokens = torch.randint(4096, (2, 20))
    ours, theirs = fewbits.load(output), AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
    layer = theirs.get_submodule("model.layers.3.mlp.down_proj")
    assert layer.stored.weight.bits_per_weight() == pytest.approx(4 + 20 / 64)
    half = AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16)
    assert (
        half.dtype == torch.bfloat16
        and half.get_submodule("model.layers.3.mlp.down_proj").stored.weight.terms[0].scales.dtype == torch.float16
    )


def test_shards_hold_the_same_model(compressed, tmp_path):
    output, _ = compressed
    source = fewbits.api.open_model(MODEL)
    checkpoint.write_checkpoint(
        tmp_path / "new", source, lambda: checkpoint.read_layers(output), lambda folder: ({}, ""), shard_bytes=10**6
    )
    shards = sorted((tmp_path / "new").glob("model-*.safetensors"))
    assert len(shards) > 2 and sum(shard.stat().st_size > 1.1 * 10**6 for shard in shards) == 1  # the embedding
    tokens = torch.randint(4096, (1, 10))
    with torch.no_grad():
        assert torch.equal(fewbits.load(tmp_path / "new")(tokens).logits, fewbits.load(output)(tokens).logits)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
        assert torch.equal(theirs(tokens).logits, fewbits.load(output)(tokens).logits)


@pytest.mark.slow
def test_gptq_on_the_real_model_keeps_most_of_what_rounding_loses(tmp_path, monkeypatch):
    """The proof of gptq.md at small scale, item 4: rtn worse than gptq worse than dense, beyond the noise of the text."""
    calibration, heldout = fewbits.TextSample(count=24, length=256), fewbits.TextSample("builtin:heldout", 16, 256)

    def lost(name, method, reference=MODEL):
        fewbits.compress(MODEL, method, tmp_path / name, calibration=calibration, probe=None)
        return fewbits.evaluate(tmp_path / name, reference=reference, text=heldout)["results"]

    gptq4, gptq3 = (lost(f"gptq{bits}", Gptq(bits=bits, group_size=64)) for bits in (4, 3))
    assert gptq4["perplexity"] < 1.015 * gptq4["reference_perplexity"] and gptq3["delta_loss_interval"][0] > 0
    rtn3, rtn2 = (lost(f"rtn{bits}", Rtn(bits=bits, group_size=64)) for bits in (3, 2))
    assert gptq3["delta_loss"] < 0.5 * rtn3["delta_loss"] and rtn3["delta_loss"] > 0.05
    assert rtn2["perplexity"] > 2 * rtn2["reference_perplexity"]
    paired = fewbits.evaluate(tmp_path / "rtn3", reference=tmp_path / "gptq3", text=heldout)["results"]
    assert paired["delta_loss_interval"][0] > 0
    # The ablation: the Hessian replaced by its diagonal is round-to-nearest again.
    whole = Hessian.matrix.fget
    monkeypatch.setattr(Hessian, "matrix", property(lambda self: torch.diag(whole(self).diagonal())))
    worse = lost("diagonal", Gptq(bits=3, group_size=64), tmp_path / "gptq3")
    assert worse["delta_loss_interval"][0] > 0.03


def test_every_record_fits_the_schema(compressed):
    output, record = compressed
    text = fewbits.TextSample("builtin:heldout", 2, 32)
    records = [
        record,
        checkpoint.read_record(output),
        fewbits.evaluate(MODEL, text=text),
        fewbits.evaluate(output, reference=MODEL, text=text),
    ]
    validator = jsonschema.Draft202012Validator(schema())
    for one in records:
        validator.validate(one)
    for broken in ({**record, "kind": "other"}, {**record, "results": {}}, {k: v for k, v in record.items() if k != "seconds"}):
        assert not validator.is_valid(broken)


def test_one_block_at_a_time_gives_the_same_numbers(compressed):
    output, _ = compressed
    text = fewbits.TextSample("builtin:heldout", 6, 32)
    whole, streamed = (fewbits.evaluate(output, reference=MODEL, text=text, streamed=one)["results"] for one in (False, True))
    intervals = [one.pop("delta_loss_interval") for one in (whole, streamed)]
    assert whole["kl_mean"] > 0 and streamed == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert intervals[0] == pytest.approx(intervals[1], rel=1e-3)


@pytest.mark.parametrize("name", [name for family in ("weights", "activations") for name in list_methods(family)])
def test_what_a_method_stores_is_counted_without_a_model(name):
    method = get_method(name)()
    bits = fewbits.api.stored_bits(method)
    assert bits == fewbits.api.stored_bits(method)  # the same every time
    if isinstance(method, (LayerMethod, BlockMethod)):
        assert 1 < sum(bits.values()) < 16 and min(bits.values()) > 0


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path, capsys):
    main = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "quickstart.py"))["main"]
    main(tmp_path / "result.json", samples=2, windows=2, length=32)
    assert (tmp_path / "result.json").is_file() and capsys.readouterr().out.count("gptq") == 3
