"""What every method that compresses linear layers must do, whatever its idea: run on a small random language model."""

from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.core.errors import NumericsError
from fewbits.core.method import BlockMethod, LayerMethod
from fewbits.core.registry import get_method, list_methods
from fewbits.core.tensor import from_stored
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import StreamOptions, compress_model

NAMES = [
    name
    for family in ("weights", "activations")
    for name in list_methods(family)
    if issubclass(get_method(name), (LayerMethod, BlockMethod))
]
WINDOWS = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(0))


def made(name):
    """The method with its defaults; one that learns takes few steps."""
    method = get_method(name)()
    names = ("steps", "tune_steps") if isinstance(method, BlockMethod) else ("tune_steps",)
    few = {field.name: 4 for field in fields(method) if field.name in names and getattr(method, field.name)}
    return replace(method, **few)


def small_llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small_llama().save_pretrained(path)
    return path


def contents(work):
    return {path.name: path.read_bytes() for path in sorted(work.iterdir()) if path.name.startswith("block-")}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_stored_counted_repeated_and_resumed(name, folder, tmp_path):
    source, plan = open_model(folder), Plan(made(name))
    summary = compress_model(source, plan, WINDOWS, tmp_path / "first")
    layers, record = dict(summary.layers()), summary.record()
    assert len(layers) == 21 and not record["silent"]
    stored = {key: tensor for block in range(3) for key, tensor in load_file(tmp_path / "first" / f"block-0000{block}.safetensors").items()}
    counted = sum(tensor.nbytes * 8 for key, tensor in stored.items() if not key.startswith("replaced/"))
    assert sum(record["bits"].values()) == counted
    for layer in layers.values():
        again = from_stored(layer.settings(), layer.tensors())
        assert torch.equal(again.weight.decode(), layer.weight.decode()) and bool(torch.isfinite(layer.weight.decode()).all())
        inputs = torch.randn(5, layer.weight.shape[1], generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(layer.weight.matmul(inputs), inputs @ layer.weight.decode().T, rtol=1e-3, atol=1e-3)

    compress_model(source, plan, WINDOWS, tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")

    def stop(block, blocks, text, error, left):
        if block == 0 and "step" not in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(source, plan, WINDOWS, tmp_path / "stopped", StreamOptions(progress=stop))
    compress_model(source, plan, WINDOWS, tmp_path / "stopped")
    assert contents(tmp_path / "first") == contents(tmp_path / "stopped")


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_not_a_number_is_refused_by_name(name, tmp_path):
    model = small_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(NumericsError, match=r"model\.layers\.\d\.\S+.*not finite"):
        compress_model(open_model(tmp_path / "model"), Plan(made(name)), WINDOWS, tmp_path / "work")
