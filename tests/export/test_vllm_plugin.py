"""The plugin against vLLM's interface: stand-ins with the names, signatures and order of calls of vLLM 0.33."""

import gc
import importlib
import json
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from fewbits import api
from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.permutation import Permutation
from fewbits.formats.sparse import Sparse
from fewbits.layers.activation import TokenQuantizer
from fewbits.layers.linear import StoredLinear

ROOT = Path(__file__).parents[2]
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
STACKED = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v")}
STACKED |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
INPUTS = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))


class QuantizeMethodBase:
    pass


class LinearMethodBase(QuantizeMethodBase):
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    pass


class QuantizationConfig:
    def __init__(self):
        self.packed_modules_mapping = {}


class LinearBase(nn.Module):
    """What vLLM's linears do with a quant method, in their order: ask for it, create, load by name and shard, process, apply."""

    def __init__(self, input_size, output_sizes, quant_config, prefix, *, bias=False, gpus=1):
        super().__init__()
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=input_size,
            output_partition_sizes=[size // gpus for size in output_sizes],
            input_size=input_size,
            output_size=sum(output_sizes),
            params_dtype=torch.float32,
            weight_loader=lambda *_: pytest.fail("the plugin's own loader is asked"),
        )
        self.bias = nn.Parameter(torch.randn(sum(output_sizes)), requires_grad=False) if bias else None

    def load(self, tensors):
        for name, loaded, shard in tensors:
            parameter = getattr(self, name)
            parameter.weight_loader(parameter, loaded, *([] if shard is None else [shard]))
        self.quant_method.process_weights_after_loading(self)

    def forward(self, inputs):
        return self.quant_method.apply(self, inputs, self.bias)


class Mapper:
    """vLLM's WeightsMapper, of which a configuration sees this."""

    def apply_dict(self, values):
        return {f"language_model.{name}": value for name, value in values.items()}


@pytest.fixture
def plugin(monkeypatch):
    """The plugin's module, imported with stand-ins for what it takes from vLLM; `registered` holds what it registers."""
    registered = {}
    layers = {"LinearBase": LinearBase, "LinearMethodBase": LinearMethodBase, "UnquantizedLinearMethod": UnquantizedLinearMethod}
    configs = {"QuantizationConfig": QuantizationConfig, "QuantizeMethodBase": QuantizeMethodBase}
    names = ("vllm", "vllm.model_executor", "vllm.model_executor.layers")
    put = {name: {} for name in names} | {
        f"{names[2]}.linear": layers,
        f"{names[2]}.quantization": {"register_quantization_config": lambda name: lambda kind: registered.setdefault(name, kind)},
        f"{names[2]}.quantization.base_config": configs,
    }
    for name, contents in put.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fewbits.export.vllm_plugin", raising=False)
    module = importlib.import_module("fewbits.export.vllm_plugin")
    module.registered = registered
    yield module
    sys.modules.pop("fewbits.export.vllm_plugin", None)


@pytest.fixture
def folder(compressed, uniform):
    """Layers of one fused linear differ in bits, terms, transforms and rounding; one layer stayed dense."""

    def make(name, weight):
        if name.endswith("1.mlp.down_proj"):
            return None
        stored = uniform(3 if "k_proj" in name else 4, 16)(name, weight)
        if not name.endswith("v_proj"):
            return stored
        term, order = stored.weight.terms[0], torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
        mask = torch.zeros(weight.shape, dtype=torch.bool).index_fill_(1, torch.tensor([0]), True)
        weight = CompressedTensor((term, Sparse.from_dense(torch.ones(weight.shape), mask)), (Permutation.from_order(order),))
        return StoredLinear(weight, TokenQuantizer(8), torch.ones(term.rows))

    return compressed(make)


def config_of(plugin, folder):
    made = plugin.FewbitsConfig.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    made.packed_modules_mapping = PACKED
    return made


def tensors_of(folder, prefix):
    """What vLLM's loader gives the layer `prefix`: names inside it, tensors, and which shard they are."""
    owner, _, last = prefix.rpartition(".")
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            module, _, inside = name.rpartition(".")
            above, _, part = module.rpartition(".")
            fused, shard = STACKED.get(part, (part, None))
            if (above, fused) == (owner, last) and inside != "bias":
                yield inside, file.get_tensor(name), shard


def made(plugin, folder, prefix, sizes, inputs=64, **more):
    layer = LinearBase(inputs, sizes, config_of(plugin, folder), prefix, **more)
    layer.load(tensors_of(folder, prefix))
    return layer


def test_the_entry_point_registers_the_configuration(plugin):
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, function = said["fewbits"].partition(":")
    assert module == plugin.__name__
    getattr(plugin, function)()
    getattr(plugin, function)()
    assert plugin.registered == {"fewbits": plugin.FewbitsConfig}
    config = plugin.FewbitsConfig({})
    assert (config.get_name(), config.get_min_capability(), config.get_config_filenames()) == ("fewbits", 0, [])
    assert torch.bfloat16 in config.get_supported_act_dtypes()


@pytest.mark.parametrize(
    ("prefix", "sizes", "inputs"),
    [
        ("model.layers.0.self_attn.qkv_proj", [64, 32, 32], 64),
        ("model.layers.1.mlp.gate_up_proj", [96, 96], 64),
        ("model.layers.0.self_attn.o_proj", [64], 64),
        ("model.layers.0.mlp.down_proj", [64], 96),
    ],
)
def test_a_fused_layer_computes_what_its_parts_do(plugin, folder, prefix, sizes, inputs):
    owner, _, last = prefix.rpartition(".")
    layer = made(plugin, folder, prefix, sizes, inputs, bias=True)
    ours, x = api.load(folder), torch.randn(2, 3, inputs, generator=torch.Generator().manual_seed(1))
    parts = [ours.get_submodule(f"{owner}.{part}") for part in PACKED.get(last, [last])]
    plain = [part(x) - (0 if part.bias is None else part.bias) for part in parts]
    torch.testing.assert_close(layer(x), torch.cat(plain, -1) + layer.bias)
    assert not [name for name, _ in layer.named_parameters() if name != "bias"]


def test_compilation_sees_one_operation(plugin, folder):
    layer = made(plugin, folder, "model.layers.0.self_attn.qkv_proj", [64, 32, 32])
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=keep)
    with torch.no_grad():
        assert torch.equal(compiled(INPUTS), layer(INPUTS))
    assert graphs == [["fewbits.products.default"]] or graphs == [["fewbits.products"]]
    torch.library.opcheck(plugin.products, (INPUTS, layer.fewbits_name), test_utils=("test_schema", "test_faketensor"))


def test_two_models_of_one_process_do_not_share_names(plugin, folder):
    prefix = "model.layers.0.self_attn.o_proj"
    first, second = (made(plugin, folder, prefix, [64]) for _ in range(2))
    assert (first.fewbits_name, second.fewbits_name) == (prefix, f"{prefix}#2")
    del first
    gc.collect()
    assert made(plugin, folder, prefix, [64]).fewbits_name == prefix


def test_what_stayed_dense_or_is_no_linear_is_left_to_vllm(plugin, folder):
    config = config_of(plugin, folder)
    linear = LinearBase.__new__(LinearBase)
    assert type(config.get_quant_method(linear, "model.layers.1.mlp.down_proj")) is UnquantizedLinearMethod
    assert config.get_quant_method(nn.Embedding(2, 2), "lm_head") is None
    assert config.get_quant_method(nn.Module(), "model.layers.0.self_attn.attn") is None
    config.apply_vllm_mapper(Mapper())
    assert type(config.get_quant_method(linear, "language_model.model.layers.0.mlp.down_proj")) is plugin.FewbitsLinearMethod


def test_what_cannot_be_served_says_why(plugin, folder):
    config = config_of(plugin, folder)
    with pytest.raises(InputError, match=r"self_attn\.q_proj is compressed and is computed by a Module; a model whose linears alone"):
        config.get_quant_method(nn.Module(), "model.layers.0.self_attn")
    del config.layers["model.layers.0.self_attn.k_proj"]
    with pytest.raises(InputError, match=r"qkv_proj is computed as one, and model\.layers\.0\.self_attn\.k_proj is not compressed"):
        config.get_quant_method(LinearBase.__new__(LinearBase), "model.layers.0.self_attn.qkv_proj")
    with pytest.raises(InputError, match="the folder is of format 1; 2, as fewbits compress writes it, would be right"):
        plugin.FewbitsConfig.from_config({"format": 1, "layers": {}})
    with pytest.raises(InputError, match="is shared out over several GPUs; --tensor-parallel-size 1 would be right"):
        made(plugin, folder, "model.layers.0.self_attn.o_proj", [64], gpus=2)
    with pytest.raises(InputError, match=r"stored in sizes \[\(64, 64\)\], and the model has \[32\] outputs of 64 inputs"):
        made(plugin, folder, "model.layers.0.self_attn.o_proj", [32])


def test_files_that_do_not_fit_are_refused(plugin, folder):
    prefix = "model.layers.0.self_attn.qkv_proj"
    tensors = list(tensors_of(folder, prefix))

    def load(changed):
        LinearBase(64, [64, 32, 32], config_of(plugin, folder), prefix).load(changed)

    load(tensors)
    with pytest.raises(InputError, match=r"the tensor weight__terms__0__codes of part 1 of \S+qkv_proj is missing"):
        load([one for one in tensors if (one[0], one[2]) != ("weight__terms__0__codes", "k")])
    for change, said in (
        (lambda name, one, shard: (name, one, "x"), "has 3 parts, and none of them is 'x'"),
        (lambda name, one, shard: (name, one, None), "has 3 parts, and none of them is None"),
        (lambda name, one, shard: (name, one[:-1], shard), r"of part \d of \S+ is torch\.\w+ \[\d+.*; torch\.\w+ \[\d+.*\] would be right"),
        (lambda name, one, shard: (name, one.double(), shard), r"is torch\.float64"),
    ):
        with pytest.raises(InputError, match=said):
            load([change(*one) for one in tensors])
    with pytest.raises(InputError, match="no such tensor would be right"):
        load([(name, one, "q") for name, one, shard in tensors if shard == "v"])
