import torch

from fewbits.solvers.outliers import largest_reserved


def test_values_far_above_the_rest_are_outliers():
    values = torch.cat([torch.linspace(0.1, 1.0, 200), torch.tensor([9.0, 9.5, 10.0])])
    assert float(largest_reserved(values)) == 1.0


def test_without_candidates_nothing_is_cut():
    values = torch.linspace(0, 1, 100)
    assert float(largest_reserved(values)) == 1.0
    assert float(largest_reserved(torch.full((10,), 2.0))) == 2.0


def test_it_is_the_best_split_by_trying_all():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, generator=generator).abs().pow(3)
    ordered = values.sort().values.double()
    limit = ordered[225] + 1.5 * (ordered[225] - ordered[75])
    best, kept = 0.0, ordered[-1]
    for at in range(1, len(ordered)):
        upper = ordered[at:]
        if ordered[at] <= limit:
            continue
        score = float((ordered[at] - ordered[at - 1]) ** 2 - upper.var(correction=0))
        if score > best:
            best, kept = score, ordered[at - 1]
    assert float(largest_reserved(values)) == float(kept)
