import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.core.errors import InputError
from fewbits.evaluation.caches import by_position, score_cache
from fewbits.evaluation.fidelity import score, summarize
from fewbits.methods.kvcache.kivi import Kivi
from fewbits.models.hf_cache import CompressedCache

WINDOWS = torch.randint(64, (5, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, initializer_range=0.3)).eval()


def test_while_nothing_is_sealed_nothing_is_lost(model):
    scores, memory = score_cache(model, WINDOWS, lambda: CompressedCache(model, Kivi(residual=32)), prompt=10, batch_size=2)
    assert scores.loss.shape == (5, 13)
    torch.testing.assert_close(scores.loss, score(model, WINDOWS).loss[:, 10:], rtol=1e-4, atol=1e-4)
    assert float(scores.forward_kl.max()) < 1e-6 and memory["bits_per_element"] == 32
    assert summarize(scores)["top1_agreement"] == 1


def test_fewer_bits_lose_more(model):
    lost = []
    for bits in (8, 4, 3, 2):
        method = Kivi(bits=bits, group_size=4, residual=4)
        lost.append(
            float(score_cache(model, WINDOWS, lambda method=method: CompressedCache(model, method), prompt=10)[0].forward_kl.mean())
        )
    assert lost == sorted(lost) and lost[0] < 1e-3 < lost[-1]


def test_means_are_taken_between_positions():
    values = torch.arange(12.0).reshape(2, 6)  # positions 10 to 15
    assert by_position(values, 10, (0, 8, 12, 20)) == [{"start": 8, "end": 12, "mean": 3.5}, {"start": 12, "end": 20, "mean": 6.5}]


def test_a_prompt_must_leave_something_to_score(model):
    with pytest.raises(InputError, match="1 to 22 would be right"):
        score_cache(model, WINDOWS, lambda: CompressedCache(model, Kivi()), prompt=23)
