import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.models.adapter import Adapter
from fewbits.models.reorder import reorder_channels


def falling(makers):
    return torch.argsort(torch.stack([one.square().sum(1) for one in makers]).prod(0), descending=True)


def test_a_gated_block_computes_the_same_with_its_channels_in_another_order():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).eval()
    name, tokens = "model.layers.0", torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, gate = model(tokens).logits, model.model.layers[0].mlp.gate_proj.weight.clone()
        orders = reorder_channels(name, model.model.layers[0], Adapter(model).linears(name), falling)
        after = model(tokens).logits
    assert set(orders) == {f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"}
    order = orders[f"{name}.mlp.up_proj"]
    assert not torch.equal(order, torch.arange(48)) and torch.equal(model.model.layers[0].mlp.gate_proj.weight, gate[order])
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_what_a_bias_a_norm_or_a_layer_that_stays_would_break_is_left_alone():
    torch.manual_seed(0)
    blocks = {
        "bias": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)),
        "norm": nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)),
        "kept": nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4)),
    }
    for kind, block in blocks.items():
        linears = {f"b.{name}": one for name, one in block.named_children() if isinstance(one, nn.Linear)}
        if kind == "kept":
            linears.pop("b.2")
        before = {key: value.clone() for key, value in block.state_dict().items()}
        assert reorder_channels("b", block, linears, falling) == {}
        assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


def test_a_reader_with_a_bias_is_no_hindrance():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 8, bias=False), nn.GELU(), nn.Linear(8, 4))
    inputs = torch.randn(5, 6)
    with torch.no_grad():
        before = block(inputs)
        assert set(reorder_channels("b", block, {"b.0": block[0], "b.2": block[2]}, falling)) == {"b.0"}
        torch.testing.assert_close(block(inputs), before, rtol=0, atol=1e-6)
