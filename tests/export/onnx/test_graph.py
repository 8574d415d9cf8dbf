"""Whole models as graphs: run by onnxruntime against our own logits, and read back."""

import numpy as np
import pytest
import torch
import transformers as hf

from fewbits import api
from fewbits.core.errors import InputError
from fewbits.export.checkpoint import read_layers
from fewbits.export.foreign import is_foreign
from fewbits.export.grids import read_grid
from fewbits.export.run import export
from fewbits.export.targets.onnx import Onnx
from fewbits.models.source import open_model

onnx_ir = pytest.importorskip("onnx_ir", reason="pip install 'fewbits[onnx]'")
LLAMA = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA |= {"num_hidden_layers": 1, "head_dim": 16}
LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.slow
def test_onnxruntime_computes_the_logits_of_the_folder_and_layers_read_back(compressed, uniform, graph_session, assert_graph_is, tmp_path):
    sizes = LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).save_pretrained(tmp_path / "model")
    folder = compressed(uniform(4, 16), tmp_path / "model")
    record = export(folder, Onnx(), tmp_path / "out").record()
    assert record["layers"] == 7 and set(record["files"]) >= {"model.onnx", "model.onnx.data", "config.json"}
    assert_graph_is(folder, tmp_path / "out")
    again = dict(Onnx().read(tmp_path / "out"))
    for name, stored in read_layers(folder):
        assert torch.equal(read_grid(again[name].weight).codes, read_grid(stored.weight).codes)
        assert torch.equal(again[name].weight.decode(), stored.weight.decode())
    held = {name: tensor for name, tensor in Onnx().written(tmp_path / "out") if name.startswith(f"{LAYER}.terms")}
    kinds = {name.removeprefix(f"{LAYER}.terms.0."): tensor.dtype for name, tensor in held.items()}
    assert kinds == {"blob": torch.uint8, "scales": torch.float16, "zero_points": torch.uint8}
    assert not is_foreign(tmp_path / "out")
    opened = graph_session(tmp_path / "out")
    assert [one.shape for one in opened.get_inputs()][:2] == [["batch", "sequence"], ["batch", "past + sequence"]]
    assert [one.name for one in opened.get_outputs()][:3] == ["logits", "present.0.key", "present.0.value"]
    damage(tmp_path / "out")


def damage(out):
    """A file cut short, and a layer without its scales, are named."""
    whole = (out / "model.onnx").read_bytes()
    (out / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.onnx cannot be read as ONNX"):
        dict(Onnx().read(out))
    (out / "model.onnx").write_bytes(whole)
    model = onnx_ir.load(out / "model.onnx")
    model.graph.initializers[f"{LAYER}.terms.0.scales"].name = "another"
    onnx_ir.save(model, out / "model.onnx")
    with pytest.raises(InputError, match=rf"{LAYER}: .*terms\.0\.scales"):
        dict(Onnx().read(out))


@pytest.mark.slow
def test_layers_that_are_stored_turned_run_too(compressed, uniform, assert_graph_is, tmp_path):
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")

    def make(name, weight):
        return uniform(8, 32)(name, weight.T.contiguous() if ".c_" in name else weight)  # GPT-2's layers store the transpose

    folder = compressed(make, tmp_path / "model")
    export(folder, Onnx(), tmp_path / "out")
    assert_graph_is(folder, tmp_path / "out")


@pytest.mark.slow
def test_encoders_are_written_with_standard_operators(compressed, uniform, graph_session, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 4096}
    torch.manual_seed(0)
    hf.BertModel(hf.BertConfig(**sizes)).save_pretrained(tmp_path / "model")
    open_model("builtin:tiny-lm").tokenizer().save_pretrained(tmp_path / "model")
    four, eight = uniform(4, 8), uniform(8, None, symmetric=True)
    folder = compressed(lambda name, weight: (four if "attention" in name else eight)(name, weight), tmp_path / "model")
    export(folder, Onnx(), tmp_path / "out")
    operators = {(node.domain, node.op_type) for node in onnx_ir.load(tmp_path / "out/model.onnx").graph}
    assert ("", "DequantizeLinear") in operators and all(domain == "" for domain, _ in operators)
    ids, mask = torch.arange(24).view(3, 8), torch.ones(3, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    opened, given = graph_session(tmp_path / "out"), {"input_ids": ids, "attention_mask": mask}
    assert [one.name for one in opened.get_outputs()] == ["last_hidden_state"]
    with torch.no_grad():
        ours = api.load(folder)(**given).last_hidden_state.numpy()
    wanted = {one.name for one in opened.get_inputs()}
    theirs = opened.run(None, {name: value.numpy() for name, value in given.items() if name in wanted})[0]
    assert np.linalg.norm(theirs - ours) / np.linalg.norm(ours) < 1e-5
    again = dict(Onnx().read(tmp_path / "out"))
    for name, stored in read_layers(folder):
        assert torch.equal(again[name].weight.terms[0].codes, stored.weight.terms[0].codes)
