import torch

from fewbits.solvers.relu import relu_inner, relu_series


def sampled():
    """Means, deviations, directions of eight variables, and a million draws of each."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(8, 4, generator=generator, dtype=torch.float64), dim=1)
    mean = torch.randn(8, generator=generator, dtype=torch.float64)
    deviation = 0.5 + torch.rand(8, generator=generator, dtype=torch.float64)
    noise = torch.randn(1_000_000, 4, generator=generator, dtype=torch.float64)
    return mean, deviation, directions, (mean + deviation * (noise @ directions.T)).relu()


def test_means_and_second_moments_are_those_of_samples():
    mean, deviation, directions, values = sampled()
    series = relu_series(mean, deviation, order=20)
    torch.testing.assert_close(series[:, 0], values.mean(0), atol=5e-3, rtol=0)
    moments = relu_inner(series, series, directions @ directions.T)
    torch.testing.assert_close(moments, values.T @ values / len(values), atol=1e-2, rtol=0)
    series[:, 0] = 0
    torch.testing.assert_close(relu_inner(series, series, directions @ directions.T), torch.cov(values.T), atol=1e-2, rtol=0)


def test_every_term_is_the_hermite_expectation():
    mean, deviation, *_ = sampled()
    nodes = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-nodes.square() / 2) / (2 * torch.pi) ** 0.5 * (nodes[1] - nodes[0])
    rectified = (mean[:, None] + deviation[:, None] * nodes).relu() * density
    fifth = (nodes**5 - 10 * nodes**3 + 15 * nodes) / 120**0.5
    torch.testing.assert_close(relu_series(mean, deviation)[:, 5], rectified @ fifth, atol=1e-7, rtol=0)


def test_a_short_series_is_positive_semidefinite_and_extremes_are_finite():
    mean, deviation = torch.tensor([0.0, 50.0, -50.0, 1.0, 1e4]), torch.tensor([1.0, 1.0, 1.0, 0.0, 1e-3])
    series = relu_series(mean, deviation, order=6)
    assert torch.isfinite(series).all()
    torch.testing.assert_close(series[1, :3], torch.tensor([50.0, 1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(series[2], torch.zeros(7, dtype=torch.float64))
    torch.testing.assert_close(series[3, :2], torch.tensor([1.0, 0.0], dtype=torch.float64))
    *_, directions, _ = sampled()
    series = relu_series(sampled()[0], sampled()[1], order=3)
    assert torch.linalg.eigvalsh(relu_inner(series, series, directions @ directions.T)).min() > -1e-12
