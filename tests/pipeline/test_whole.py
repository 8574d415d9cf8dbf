import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.layers.adapted import AdaptedLinear
from fewbits.models.source import open_model
from fewbits.pipeline.whole import whole_model

TOKENS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_model_is_the_model(tied, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).save_pretrained(tmp_path)
    source = open_model(tmp_path)
    adapted = []

    def replace(name, linear):
        if "mlp" not in name:
            return None
        adapted.append(AdaptedLinear(linear.weight.detach(), linear.bias, 4, seed=len(adapted)))
        return adapted[-1]

    model = whole_model(source, replace)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, source.load()(input_ids=TOKENS).logits)
    assert len(adapted) == 6 and not any(parameter.is_meta for _, parameter in model.named_parameters(remove_duplicate=False))
    assert {one for one in model.parameters() if one.requires_grad} == {part for one in adapted for part in (one.down, one.up)}
    for one in adapted:
        with torch.no_grad():
            one.up.normal_()
        inputs = torch.randn(3, one.down.shape[1])
        torch.testing.assert_close(one.eval()(inputs), inputs @ one.merged().T, rtol=1e-4, atol=1e-5)
