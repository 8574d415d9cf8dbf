"""One layer to try methods on: heavy-tailed weights, correlated inputs of unequal size, and held-out inputs."""

import torch

from fewbits.core.method import Statistics
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.moments import Moments
from fewbits.statistics.ranges import Ranges


def heavy_layer(seed=0, rows=128, columns=256):
    """Weights of Student's t with 5 degrees of freedom; statistics of 3072 tokens; 1024 held-out tokens."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    spread = torch.randn(5, rows, columns, generator=generator).square().mean(0).sqrt()
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(4096, columns, generator=generator) @ mixing
    inputs = inputs * torch.exp(0.5 * torch.randn(columns, generator=generator))
    gathered = Hessian(columns), Moments(columns), Ranges(columns)
    for statistic in gathered:
        statistic.update(inputs[:3072])
    return 0.02 * normal / spread, Statistics(*gathered, tokens=3072), inputs[3072:]


def output_error(weight, decoded, inputs):
    """Squared output error over squared output."""
    return float((inputs @ (weight - decoded).T).square().sum() / (inputs @ weight.T).square().sum())
