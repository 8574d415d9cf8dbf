import pytest
import torch
from torch import nn

from fewbits.core.errors import NumericsError
from fewbits.pipeline.gather import SharedInputs
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.sequence_norms import SequenceNorms

INPUTS = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0))


def test_it_is_the_mean_of_the_sequences_norms_and_merges():
    whole, first, second = SequenceNorms(3), SequenceNorms(3), SequenceNorms(3)
    whole.update(INPUTS)
    first.update(INPUTS[:2])
    second.update(INPUTS[2])
    second.update(INPUTS[3:])
    first.merge(second)
    expected = torch.stack([INPUTS[s].norm(dim=0) for s in range(5)]).mean(0)
    torch.testing.assert_close(whole.mean, expected)
    torch.testing.assert_close(first.mean, expected)
    assert torch.equal(SequenceNorms(2).mean, torch.zeros(2))


def test_padding_does_not_count():
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 1, 2])[:, None]
    norms = SequenceNorms(3)
    norms.update(INPUTS, mask.float())
    torch.testing.assert_close(norms.mean, (INPUTS * mask[..., None]).norm(dim=1).mean(0))


def test_the_pipeline_tells_it_where_sequences_end_and_others_get_tokens():
    layers = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 4)})
    groups = SharedInputs(layers, [Hessian, SequenceNorms])
    for number, part in enumerate((INPUTS[:2], INPUTS[2:])):
        for layer in layers.values():
            layer(part)
        if number == 0:
            groups.settle()
    [(names, statistics)] = groups.close().items()
    assert names == ("a", "b") and statistics.tokens == 35
    torch.testing.assert_close(statistics[SequenceNorms].mean, INPUTS.norm(dim=1).mean(0))
    torch.testing.assert_close(statistics[Hessian].matrix, 2 / 35 * INPUTS.flatten(0, 1).T @ INPUTS.flatten(0, 1))


def test_what_is_not_finite_is_refused():
    with pytest.raises(NumericsError, match="not finite"):
        SequenceNorms(2).update(torch.tensor([[[torch.nan, 1.0]]]))
