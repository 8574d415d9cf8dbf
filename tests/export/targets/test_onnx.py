"""ONNX folders: run by onnxruntime against our own logits, and what they refuse."""

import pytest
import torch
import transformers as hf

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.checkpoint import read_layers
from fewbits.export.onnx import graph
from fewbits.export.run import export, holders
from fewbits.export.target import get_target
from fewbits.export.targets.onnx import Onnx
from fewbits.formats.codebook import Codebook
from fewbits.formats.diagonal import DiagonalScale
from fewbits.layers.linear import StoredLinear

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'fewbits[onnx]'")
LAYER = "model.layers.1.mlp.up_proj"


def test_what_no_operator_holds_is_refused_and_widened_on_request(compressed, uniform, tmp_path):
    folder = compressed(lambda name, weight: uniform(3 if name == LAYER else 4, 16)(name, weight))
    with pytest.raises(InputError, match=rf"onnx cannot hold {LAYER}: its codes have 3 bits, .*compressed-tensors, dense can"):
        export(folder, Onnx(), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    (stored,) = (stored for name, stored in read_layers(folder) if name == LAYER)
    made = Onnx().requantize(stored)
    assert torch.equal(made.weight.decode(), stored.weight.decode()) and made.weight.terms[0].bits_per_code == 4
    assert torch.equal(made.weight.terms[0].unpacked_codes(), stored.weight.terms[0].unpacked_codes())


def test_other_terms_are_rounded_on_request(uniform):
    levels = torch.linspace(-1, 1, 16)[None].half()
    term = Codebook.from_codes(torch.arange(64).view(2, 32) % 16, levels[None], bits=4)
    stored = StoredLinear(CompressedTensor((term,), (DiagonalScale(torch.full((32,), 2.0)),)))
    assert Onnx().refuses(stored) == "its term is of kind codebook, not a uniform grid"
    made = Onnx(bits=8, group_size=16).requantize(stored)
    assert made.weight.terms[0].bits_per_code == 8 and made.weight.terms[0].group_size == 16 and not made.weight.input_transforms
    lost = (made.weight.decode() - stored.weight.decode()).norm() / stored.weight.decode().norm()
    assert 0 < lost < 0.01


def test_an_operator_that_the_model_does_not_get_is_named(compressed, uniform, tmp_path):
    folder = compressed(uniform(4, 24))
    assert "onnx" not in holders(folder)
    with pytest.raises(InputError, match=r"groups of 24 inputs are no multiple of 16, .*; onnx:operator=qdq has a place for it"):
        export(folder, Onnx(), tmp_path / "out")
    assert Onnx("qdq").refuses(next(read_layers(folder))[1]) is None


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("onnx:bits=3", "bits=3 has no operator of ONNX; 2, 4, 8 would be right"),
        ("onnx:operator=qdq,bits=2", "bits=2 has no operator of ONNX; 4, 8 would be right"),
        ("onnx:group_size=0", "group_size=0"),
        ("onnx:operator=gemm", "operator"),
    ],
)
def test_wrong_settings_are_named(spec, says):
    with pytest.raises(InputError, match=says):
        get_target(spec)


def test_models_without_a_cache_of_keys_and_values_are_refused(compressed, uniform, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    hf.MambaForCausalLM(hf.MambaConfig(**sizes)).save_pretrained(tmp_path / "model")
    folder = compressed(uniform(4, None), tmp_path / "model")
    with pytest.raises(InputError, match="onnx cannot hold this model: MambaForCausalLM keeps no cache of keys and values"):
        export(folder, Onnx(), tmp_path / "out")


def test_a_model_that_cannot_be_traced_leaves_nothing(compressed, uniform, tmp_path, monkeypatch):
    folder = compressed(uniform(4, 16))

    def broken(*given, **named):
        raise torch.onnx.errors.OnnxExporterError("Failed to export\nand a page of reasons")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(InputError, match=r"torch cannot trace LlamaForCausalLM into an ONNX graph \(Failed to export\)"):
        export(folder, Onnx(), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_missing_packages_are_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"ONNX files need the package onnxscript; pip install 'fewbits\[onnx\]' would be right"):
        graph.package()
    monkeypatch.undo()
    monkeypatch.setattr("onnxscript.__version__", "0.7.0")
    with pytest.raises(InputError, match=r"onnxscript 0\.7\.0 writes wrong nodes for inputs in groups; 0\.7\.2 or later would be right"):
        graph.package()
    monkeypatch.undo()
    monkeypatch.delattr(torch.onnx, "ops")
    with pytest.raises(InputError, match=r"cannot write nodes of few bits; torch 2\.8 or later would be right"):
        graph.package()
