import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from fewbits.core.errors import InputError
from fewbits.pipeline.inject import inject_outliers

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


def read(model):
    """What the first linear behind each norm reads."""
    seen = {}
    first = {name: module for name, module in model.named_modules() if name.endswith(("q_proj", "gate_proj"))}
    hooks = [
        module.register_forward_pre_hook(lambda m, given, name=name: seen.__setitem__(name, given[0])) for name, module in first.items()
    ]
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


@pytest.mark.parametrize(("kind", "config"), [(LlamaForCausalLM, LlamaConfig), (GemmaForCausalLM, GemmaConfig)])
def test_logits_stay_and_what_linears_read_does_not(kind, config):
    torch.manual_seed(0)
    model = kind(config(**SIZES, head_dim=16, num_hidden_layers=2)).eval()
    before, plain = read(model)
    found = inject_outliers(model, TOKENS, share=0.05, factors=(20.0, 40.0), seed=3)
    after, changed = read(model)
    assert float((after - before).norm() / before.norm()) < 1e-5
    assert (
        len(found) == 4 and len({tuple((scale > 1).nonzero().flatten().tolist()) for scale in found.values()}) > 1
    )  # other channels at every norm
    for (name, inputs), scale in zip(changed.items(), found.values(), strict=True):
        torch.testing.assert_close(inputs, plain[name] * scale, rtol=1e-4, atol=1e-4)
        assert int((scale > 1).sum()) == 3 and bool(((scale == 1) | ((scale >= 20) & (scale <= 40))).all())


def test_the_same_seed_gives_the_same_channels():
    def drawn(seed):
        torch.manual_seed(0)
        return inject_outliers(LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1)).eval(), TOKENS, seed=seed)

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_model_without_such_norms_and_wrong_numbers_are_refused():
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1)).eval()
    with pytest.raises(InputError, match="share=2"):
        inject_outliers(model, TOKENS, share=2)
    for block in model.model.layers:
        block.input_layernorm = block.post_attention_layernorm = torch.nn.Identity()
    with pytest.raises(InputError, match="no norms that linear layers alone read"):
        inject_outliers(model, TOKENS)
