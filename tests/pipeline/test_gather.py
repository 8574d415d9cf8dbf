"""A forward that serves statistics alone ends where the last of them is known."""

import pytest
import torch
from torch import nn

from fewbits.pipeline.gather import SharedInputs
from fewbits.statistics.hessian import Hessian


class Block(nn.Module):
    """Three linears, the first of which is called `times` times; what follows the last is noted."""

    def __init__(self, times=1):
        super().__init__()
        self.first, self.beside, self.last = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.times, self.ended = times, 0

    def forward(self, hidden):
        for _ in range(self.times):
            mixed = self.first(hidden)
        outputs = self.last(mixed + self.beside(hidden))
        self.ended += 1
        return outputs


@pytest.mark.parametrize(("times", "ended"), [(1, 1), (2, 3)])
def test_it_ends_early_only_where_the_last_call_is_known(times, ended):
    torch.manual_seed(0)
    block, batches = Block(times), torch.randn(3, 2, 5, 4)
    linears = {"first": block.first, "beside": block.beside, "last": block.last}
    short = SharedInputs(linears, [Hessian])
    with torch.no_grad():
        for number, batch in enumerate(batches):
            if number:
                short.hear(lambda batch=batch: block(batch))
            else:
                block(batch)
                short.settle()
        heard = short.close()
        assert block.ended == ended
        whole = SharedInputs(linears, [Hessian])
        for number, batch in enumerate(batches):
            block(batch)
            if not number:
                whole.settle()
    whole = whole.close()
    assert list(heard) == list(whole) and len(heard) == 2
    for group, statistics in whole.items():
        assert statistics.tokens == heard[group].tokens
        assert torch.equal(statistics[Hessian].matrix, heard[group][Hessian].matrix)


def test_padding_counts_for_nothing_there_either():
    block, mask = Block(), torch.tensor([[True, True, False], [True, False, False]])
    groups = SharedInputs({"first": block.first, "last": block.last}, [Hessian])
    with torch.no_grad():
        for number, batch in enumerate(torch.randn(2, 2, 3, 4)):
            groups.mask = mask
            if number:
                groups.hear(lambda batch=batch: block(batch))
            else:
                block(batch)
                groups.settle()
    assert [statistics.tokens for statistics in groups.close().values()] == [6, 6]
