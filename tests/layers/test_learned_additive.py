import torch

from fewbits.layers.learned_additive import AdditiveLinear, SteppingLinear
from fewbits.solvers.additive import Additives
from fewbits.solvers.subspace import CodeSteps


def additives(seed=0, rows=12, groups=5, books=2):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(8, (rows, groups, books), generator=generator)
    codebooks = torch.randn(books, 8, 4, generator=generator).half().float()
    return Additives(codes, codebooks, (torch.rand(rows, 1, generator=generator) + 0.5).half().float())


def test_codewords_gather_the_gradient_of_the_weights_that_name_them():
    found, columns = additives(), 18  # the last group is not full
    learned = AdditiveLinear(found, columns, 1e-3, None)
    inputs = torch.randn(7, columns, generator=torch.Generator().manual_seed(1))
    learned(inputs).pow(3).sum().backward()
    weight = found.decode(columns).requires_grad_(True)
    (inputs @ weight.T).pow(3).sum().backward()
    books, scales = torch.zeros_like(found.codebooks), torch.zeros_like(found.scales)
    for row in range(12):
        for group in range(5):
            part = weight.grad[row, 4 * group : 4 * group + 4]
            for book in range(2):
                code = found.codes[row, group, book]
                books[book, code, : len(part)] += found.scales[row] * part
                scales[row] += (part * found.codebooks[book, code, : len(part)]).sum()
    torch.testing.assert_close(learned.codebooks.grad, books, rtol=1e-5, atol=1e-6 * float(books.abs().max()))
    torch.testing.assert_close(learned.scales.grad, scales, rtol=1e-5, atol=1e-6 * float(scales.abs().max()))


def test_a_step_moves_no_more_than_the_share_of_groups_and_counts_them():
    for share, most in ((0.05, 3), (0.3, 18)):  # of 60 groups
        learned = SteppingLinear(additives(), 20, 1e-3, None, CodeSteps(rate=0.5, share=share))
        inputs = torch.randn(7, 20, generator=torch.Generator().manual_seed(1))
        for step in range(6):
            before = learned.get_buffer("codes").clone()
            learned(inputs).pow(2).sum().backward()
            learned.advance(step / 6, True)
            moved = int((learned.get_buffer("codes") != before).any(-1).sum())
            assert moved == learned.flips[-1] <= most
        assert sum(learned.flips) > 0
        learned.advance(1.0, True)  # no gradient, no step
        assert len(learned.flips) == 6
