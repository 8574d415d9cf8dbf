import pytest
import torch

import fewbits
from fewbits.core.errors import InputError
from fewbits.evaluation.embeddings import compare_embeddings, embed
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import open_model

SENTENCES = ["A man plays a guitar.", "Someone is playing an instrument.", "The stock market fell today.", "Shares dropped on Monday."]


def test_known_numbers():
    ours = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    theirs = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    measured = compare_embeddings(ours, theirs)
    assert measured["cosine_mean"] == pytest.approx((1 + 0.96 + 1) / 3) and measured["cosine_min"] == pytest.approx(0.96)
    assert measured["rank_correlation"] == pytest.approx(0.5)  # ranks of 0.6, 0, 0.8 against those of 0.8, 0, 0.6
    assert measured["nearest_agreement"] == pytest.approx(2 / 3)  # the middle one turns from the last to the first
    with pytest.raises(InputError, match="3 or more"):
        compare_embeddings(ours[:2], theirs[:2])


def test_padding_does_not_change_an_embedding():
    source = open_model("builtin:minilm")
    model, tokenizer = source.load(), source.tokenizer()
    together = embed(model, tokenizer, [*SENTENCES, "word " * 60])[: len(SENTENCES)]
    alone = torch.cat([embed(model, tokenizer, [sentence]) for sentence in SENTENCES])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    similar = together @ together.T
    assert similar[0, 1] > 0.5 > similar[0, 2] and similar[2, 3] > 0.5  # the real model, not noise


@pytest.mark.slow
def test_a_real_encoder_is_compressed_and_measured(tmp_path):
    calibration, text = fewbits.TextSample(count=4, length=64), fewbits.TextSample("builtin:heldout", count=30)
    results = {}
    for bits in (8, 4, 2):
        fewbits.compress("builtin:minilm", Rtn(bits=bits, group_size=64), tmp_path / str(bits), calibration=calibration, probe=None)
        results[bits] = fewbits.evaluate(tmp_path / str(bits), reference="builtin:minilm", text=text)["results"]
    assert results[8]["cosine_min"] > 0.999 and results[8]["rank_correlation"] > 0.999
    assert results[8]["cosine_mean"] > results[4]["cosine_mean"] > 0.95 > results[2]["cosine_mean"]
    assert results[4]["rank_correlation"] > results[2]["rank_correlation"]
    with pytest.raises(InputError, match="against a reference"):
        fewbits.evaluate(tmp_path / "4", text=text)
