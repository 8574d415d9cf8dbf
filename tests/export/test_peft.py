import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits.core.errors import InputError
from fewbits.export.checkpoint import write_checkpoint
from fewbits.export.peft import (
    CompressedLora,
    attach,
    detach_adapter,
    find_adapter,
    install_adapter,
    load_with_adapter,
    read_adapter,
    registered,
    write_adapter,
)
from fewbits.layers.linear import CompressedLinear
from fewbits.methods.weights.apiq import Apiq
from fewbits.methods.weights.lq_lora import LqLora
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import compress_model

WINDOWS = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(0))
METHODS = {"apiq": Apiq(steps=8, adapter_bits=2.0), "lq_lora": LqLora(adapter_bits=2.0, group_size=16)}


def compressed(method, folder):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, tie_word_embeddings=True)).save_pretrained(folder / "dense")
    source = open_model(folder / "dense")
    summary = compress_model(source, Plan(method), WINDOWS, folder / "work")
    write_checkpoint(folder / "base", source, summary.layers, lambda _: ({}, ""), replaced=summary.replaced())
    return folder / "base"


@pytest.fixture(scope="module", params=list(METHODS))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    compressed(METHODS[request.param], path)
    write_adapter(path / "base", path / "adapter")
    return path


def logits(model):
    with torch.no_grad():
        return model(input_ids=WINDOWS).logits


def codes(model):
    return {name: tensor.clone() for name, tensor in model.named_buffers() if name.endswith("codes")}


def test_the_base_with_its_adapter_in_peft_is_the_compressed_model(folder):
    whole = fewbits.load(folder / "base")
    wrapped = load_with_adapter(folder / "base", folder / "adapter")
    torch.testing.assert_close(logits(wrapped), logits(whole), rtol=1e-5, atol=1e-5)
    assert isinstance(wrapped, PeftModel)
    assert sum(isinstance(module, CompressedLora) for module in wrapped.modules()) == 14
    assert not any(parameter.requires_grad for parameter in wrapped.parameters())
    with wrapped.disable_adapter():
        base = fewbits.load(folder / "base")
        detach_adapter(base)
        torch.testing.assert_close(logits(wrapped), logits(base), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(logits(base), logits(whole), atol=1e-4)
    with pytest.raises(InputError, match="cannot be merged"):
        wrapped.merge_adapter()


def test_peft_itself_reads_the_folder_onto_a_base_that_transformers_loaded(folder):
    """Only the registration of the layer type is not PEFT's own."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    whole = logits(base)
    detach_adapter(base)
    from peft import LoraConfig

    config = registered(LoraConfig.from_pretrained(str(folder / "adapter")))
    wrapped = PeftModel.from_pretrained(base, str(folder / "adapter"), config=config)
    torch.testing.assert_close(logits(wrapped), whole, rtol=1e-5, atol=1e-5)


def test_names_and_ranks_are_those_of_peft(folder):
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    factors = find_adapter(fewbits.load(folder / "base"))
    assert len(tensors) == 28 and config["peft_type"] == "LORA" and sorted(config["target_modules"]) == sorted(factors)
    for name, (left, right) in factors.items():
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], right)
        assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], left)
        assert config["rank_pattern"].get(name, config["r"]) == config["alpha_pattern"].get(name, config["lora_alpha"]) == len(right)
    assert len({len(right) for _, right in factors.values()}) > 1  # ranks follow the shapes


def test_an_adapter_that_peft_trained_and_saved_is_read_and_installed(folder, tmp_path):
    wrapped = load_with_adapter(folder / "base", folder / "adapter", trainable=True)
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert len(trained) == 28 and all(".lora_" in name for name in trained)
    before = codes(wrapped)
    optimizer = torch.optim.AdamW([parameter for parameter in wrapped.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = wrapped(input_ids=WINDOWS, labels=WINDOWS).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in codes(wrapped).items())
    wrapped.save_pretrained(tmp_path / "trained")
    base = fewbits.load(folder / "base")
    with pytest.raises(InputError, match="has a branch already"):
        install_adapter(base, tmp_path / "trained")
    detach_adapter(base)
    install_adapter(base, tmp_path / "trained")
    torch.testing.assert_close(logits(base), logits(wrapped.eval()), rtol=2e-3, atol=2e-3)  # the factors are fp16 again
    again = attach(detached(folder), tmp_path / "trained")
    torch.testing.assert_close(logits(again), logits(wrapped), rtol=1e-5, atol=1e-5)


def detached(folder):
    base = fewbits.load(folder / "base")
    detach_adapter(base)
    return base


def test_scaling_is_read(folder, tmp_path):
    (tmp_path / "scaled").mkdir()
    for file in (folder / "adapter").iterdir():
        (tmp_path / "scaled" / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "scaled" / "adapter_config.json"
    config = json.loads(path.read_text())
    doubled = {name: 2 * alpha for name, alpha in config["alpha_pattern"].items()}
    path.write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"], "alpha_pattern": doubled}))
    plain, scaled = read_adapter(folder / "adapter"), read_adapter(tmp_path / "scaled")
    assert all(torch.allclose(scaled[name][0], 2 * plain[name][0]) for name in plain)


def test_what_is_no_adapter_is_named(folder, tmp_path):
    base = compressed(Rtn(bits=4, group_size=16), tmp_path)
    with pytest.raises(InputError, match="no low-rank branches"):
        write_adapter(base, tmp_path / "adapter")
    with pytest.raises(InputError, match="exists and is not empty"):
        write_adapter(folder / "base", folder / "adapter")
    with pytest.raises(InputError, match="no PEFT folder"):
        read_adapter(tmp_path)
    with pytest.raises(InputError, match="has no compressed layer"):
        install_adapter(fewbits.load(tmp_path / "dense"), folder / "adapter")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.data")
@pytest.mark.parametrize(("method", "fields"), [("apiq", {"steps": 8}), ("lq_lora", {"iterations": 3, "weighting": "none"})])
def test_the_example_lowers_the_loss_and_leaves_the_codes(method, fields, first_blocks, tmp_path):
    path = Path(__file__).parents[2] / "examples" / "finetune_adapter.py"
    spec = importlib.util.spec_from_file_location("finetune_adapter", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    sizes = {"steps": 12, "rate": 2e-3, "windows": 8, "length": 64}
    found = example.main(tmp_path / "out", first_blocks, method, {"bits": 2} | fields, sizes)
    assert found["loss_after"] < found["loss_before"] - 0.05
    files = load_file(tmp_path / "out" / "base" / "model.safetensors")
    tuned = load_with_adapter(tmp_path / "out" / "base", tmp_path / "out" / "adapter")
    held = {name: module for name, module in tuned.named_modules() if isinstance(module, CompressedLinear)}
    assert len(held) == 14
    for name, layer in held.items():
        plain = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        assert all(torch.equal(buffer, files[f"{plain}.{key}"]) for key, buffer in layer.named_buffers())
    start, trained = (read_adapter(tmp_path / "out" / one) for one in ("start", "adapter"))
    assert start.keys() == trained.keys() and any(not torch.equal(start[name][0], trained[name][0]) for name in start)
