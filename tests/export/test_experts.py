"""Experts in files of other engines: by the names of the published model, read back, and loaded by transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.utils import logging
from transformers.utils.quantization_config import CompressedTensorsConfig

from fewbits import api
from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.experts import joined
from fewbits.export.run import export
from fewbits.export.target import get_target
from fewbits.formats.transposed import Transposed
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.models.published import published
from fewbits.models.source import open_model

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
IDS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
TARGETS = ("compressed-tensors", "gptq:checkpoint_format=gptq_v2", "awq")


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe"])
def moe(request, tmp_path_factory):
    """A folder with a small model of experts, as transformers writes it: by the names under which such models are published."""
    torch.manual_seed(0)
    if request.param == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=3, num_experts_per_tok=2))
    else:
        sizes = SIZES | {"intermediate_size": 96, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 32}
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, num_experts=3, num_experts_per_tok=2))
    path = tmp_path_factory.mktemp("moe") / request.param
    model.save_pretrained(path)
    return path


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("spec", TARGETS)
def test_files_have_the_published_names_and_read_back(moe, compressed, uniform, tmp_path, spec):
    folder = compressed(lambda name, weight: None if len(weight) < 8 else uniform(4, 16)(name, weight), source=moe)
    made = export(folder, get_target(spec), tmp_path / "out")
    written, plain = load_file(tmp_path / "out/model.safetensors"), load_file(moe / "model.safetensors")
    experts = [name.removesuffix(".weight") for name in plain if ".experts." in name]
    assert len(experts) == 3 * 3 and made.layers > len(experts)
    suffix = "weight_packed" if spec == "compressed-tensors" else "qweight"
    assert {f"{name}.{suffix}" for name in experts} <= set(written)
    kept = {name for name in written if name in plain}
    assert {name for name in plain if f"{name.removesuffix('.weight')}.{suffix}" not in written} == kept
    assert all(torch.equal(written[name], plain[name]) for name in kept)
    before, after = api.load(folder), api.load(tmp_path / "out")
    for name, module in before.named_modules():
        if isinstance(module, CompressedLinear):
            assert torch.equal(after.get_submodule(name).weight, module.weight)
    assert torch.equal(logits(after), logits(before))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_computes_what_we_do(moe, compressed, uniform, tmp_path):
    """Of symmetric grids: for experts transformers 5.24 takes no zero points along."""
    logging.disable_progress_bar()
    folder = compressed(uniform(4, 16, symmetric=True), source=moe)
    export(folder, get_target("compressed-tensors"), tmp_path / "out")
    options = {"dtype": torch.float32, "quantization_config": CompressedTensorsConfig(dequantize=True)}
    with torch.no_grad():
        theirs, ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)), logits(api.load(folder))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=float(ours.abs().max()) * 1e-3)


def test_what_routes_tokens_is_said_to_be_dense(moe, compressed, uniform, tmp_path):
    """In other engines it is a linear that would be looked for compressed."""
    export(compressed(uniform(4, 16), source=moe), get_target("compressed-tensors"), tmp_path / "out")
    ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    owner = "block_sparse_moe" if "mixtral" in moe.name else "mlp"
    assert sorted(ignored) == ["lm_head", f"model.layers.0.{owner}.gate"]


def test_experts_that_all_stayed_dense_are_taken_apart_too(moe, compressed, uniform, tmp_path):
    folder = compressed(lambda name, weight: None if ".experts." in name else uniform(4, 16)(name, weight), source=moe)
    export(folder, get_target("compressed-tensors"), tmp_path / "out")
    written, plain = load_file(tmp_path / "out/model.safetensors"), load_file(moe / "model.safetensors")
    dense = [name for name in plain if ".experts." in name]
    assert len(dense) == 3 * 3 and all(torch.equal(written[name], plain[name]) for name in dense)
    assert torch.equal(logits(api.load(tmp_path / "out")), logits(api.load(folder)))


def test_experts_of_which_some_stayed_dense_are_refused(moe, compressed, uniform, tmp_path):
    folder = compressed(lambda name, weight: None if name.endswith("gate_up_proj.1") else uniform(4, 16)(name, weight), source=moe)
    with pytest.raises(InputError, match=r"experts\.1\.\w+ stayed dense and other experts of model\.layers\.0\.mlp\.experts did not"):
        export(folder, get_target("compressed-tensors"), tmp_path / "out")


def test_every_row_of_every_expert_is_in_one_part(moe):
    shell = open_model(moe).shell()
    names, plain = published(shell), load_file(moe / "model.safetensors")
    source = open_model(moe)
    for part, (layer, rows) in names.parts.items():
        assert torch.equal(source.parameter(f"{layer}.weight")[rows], plain[f"{part}.weight"])
    seen = {}
    for layer, rows in names.parts.values():
        seen.setdefault(layer, []).extend(rows.tolist())
    assert all(sorted(rows) == list(range(shell.get_submodule(layer).out_features)) for layer, rows in seen.items())
    assert set(names.names.values()) | {f"{part}.weight" for part in names.parts} == set(plain)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda stack: {"turned": stack[0].T}, "in turned turned or mixed with others; experts by themselves would be right"),
        (lambda stack: {"mixed": stack[:2].flatten(0, 1)}, "in mixed turned or mixed with others"),
    ],
)
def test_other_layouts_of_experts_are_refused(moe, monkeypatch, rule, said):
    def revert(_, marked):
        return rule(next(tensor for tensor in marked.values() if tensor.ndim == 3 and tensor.shape[2] == 1))

    monkeypatch.setattr("fewbits.models.published.revert_weight_conversion", revert)
    with pytest.raises(InputError, match=said):
        published(open_model(moe).shell())


def test_other_parameters_in_pieces_are_refused(moe, monkeypatch):
    monkeypatch.setattr(
        "fewbits.models.published.revert_weight_conversion",
        lambda _, marked: {"a": marked["lm_head.weight"][:2], "b": marked["lm_head.weight"][2:]},
    )
    with pytest.raises(InputError, match=r"files hold lm_head\.weight in several pieces"):
        published(open_model(moe).shell())


def test_what_has_no_place_says_why(moe, compressed, uniform, tmp_path):
    def make(name, weight):
        if not name.endswith("gate_up_proj.2"):
            return uniform(4, 16)(name, weight)
        return StoredLinear(CompressedTensor((Transposed(uniform(4, 16)(name, weight.T).weight.terms[0]),)))

    with pytest.raises(InputError, match=r"experts\.2\.\w+: rows of a term of kind transposed cannot be read alone"):
        export(compressed(make, source=moe), get_target("compressed-tensors"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_of_different_bits_are_not_put_together(moe, uniform):
    shell = open_model(moe).shell()
    parts = published(shell).parts
    layer = next(layer for layer, _ in parts.values() if "gate_up_proj" in layer)
    halves = [part for part, (owner, _) in parts.items() if owner == layer]
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    layers = [(part, uniform(bits, 16)(part, weight)) for part, bits in zip(halves, (4, 8), strict=True)]
    with pytest.raises(InputError, match="its parts are compressed in different ways; the same bits and groups would be right"):
        list(joined(shell, layers))


def test_halves_of_an_expert_are_both_compressed_or_none(moe, compressed, uniform, tmp_path):
    export(compressed(uniform(4, 16), source=moe), get_target("compressed-tensors"), tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    part = next(name for name, (layer, rows) in published(open_model(moe).shell()).parts.items() if layer.endswith("gate_up_proj.1"))
    left = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{part}.")}
    save_file(left, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"is compressed and .* is not; both, or none, would be right"):
        api.load(tmp_path / "out")
