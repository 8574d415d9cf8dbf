import math
from types import SimpleNamespace

import pytest
import torch
from scipy.special import rel_entr
from torch import nn

from fewbits.core.errors import InputError, NumericsError
from fewbits.evaluation.fidelity import mean_with_error, paired_interval, score, summarize


class Bigram(nn.Module):
    """Says the same about the next token whatever came before the last one."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.tensor(table)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids].log())


OURS = Bigram([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])
THEIRS = Bigram([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.1, 0.1, 0.8]])


def test_losses_and_divergences_are_those_computed_by_hand():
    scores = score(OURS, torch.tensor([[0, 1, 2], [2, 2, 0]]), THEIRS, batch_size=1)
    # row 0 predicts 1 after 0 and 2 after 1: an off-by-one would read other cells of the table
    expected = [[0.2, 0.3], [0.5, 0.25]]
    torch.testing.assert_close(scores.loss, -torch.tensor(expected).log())
    torch.testing.assert_close(scores.reference_loss, -torch.tensor([[0.3, 0.6], [0.8, 0.1]]).log())
    p, q = THEIRS.table.numpy(), OURS.table.numpy()
    assert scores.forward_kl[0].tolist() == pytest.approx([rel_entr(p[i], q[i]).sum() for i in (0, 1)], rel=1e-5)
    assert scores.reverse_kl[1].tolist() == pytest.approx([rel_entr(q[i], p[i]).sum() for i in (2, 2)], rel=1e-5)
    assert scores.agreement.tolist() == [[1, 0], [1, 1]]


def test_a_model_is_no_distance_from_itself():
    results = summarize(score(OURS, torch.randint(3, (8, 20), generator=torch.Generator().manual_seed(0)), OURS))
    assert results["kl_mean"] == results["reverse_kl_p99"] == results["delta_loss"] == 0
    assert results["top1_agreement"] == 1 and results["perplexity"] == pytest.approx(results["reference_perplexity"], rel=1e-12)


def test_batches_change_nothing():
    windows = torch.randint(3, (7, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(score(OURS, windows, batch_size=2).loss, score(OURS, windows, batch_size=7).loss)


def test_the_error_counts_windows_not_tokens():
    repeated = torch.tensor([[1.0], [3.0], [2.0], [6.0]]).expand(4, 50)
    mean, error = mean_with_error(repeated)
    assert mean == 3 and error == pytest.approx(math.sqrt(14 / 3) / 2)


def test_the_paired_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(100):
        shared = torch.randn(40, 1, generator=generator) * 10  # what the text contributes cancels
        noise = torch.randn(2, 40, 5, generator=generator)
        low, high = paired_interval(shared + 0.3 + noise[0], shared + noise[1], resamples=400, seed=trial)
        covered += low <= 0.3 <= high
        assert high - low < 1
    assert 86 <= covered <= 100


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(InputError, match="same tokens"):
        paired_interval(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(InputError, match="2 or more"):
        score(OURS, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(InputError, match="vocabularies of 3 and 2"):
        score(OURS, torch.tensor([[0, 1]]), Bigram([[0.5, 0.5], [0.5, 0.5]]))
    with pytest.raises(NumericsError, match="not finite"):
        score(Bigram([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0, 0]]))
