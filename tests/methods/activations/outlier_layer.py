"""One layer whose inputs have a few large channels, as models' do, and whose weight has small columns there."""

import torch

from fewbits.core.method import Statistics
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.moments import Moments
from fewbits.statistics.ranges import Ranges
from fewbits.statistics.sample import Sample


def gathered(inputs):
    made = [kind(inputs.shape[1]) for kind in (Hessian, Moments, Ranges, Sample)]
    for one in made:
        one.update(inputs)
    return Statistics(*made, tokens=len(inputs))


def outlier_layer(seed=0, rows=64, columns=128, count=5, factor=30.0):
    """The weight, statistics of 512 tokens, 256 held-out tokens, all calibration tokens, and the large channels, sorted."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(768, columns, generator=generator) @ mixing
    weight = torch.randn(rows, columns, generator=generator)
    large = torch.randperm(columns, generator=generator)[:count]
    inputs[:, large] *= factor
    weight[:, large] /= factor
    return weight, gathered(inputs[:512]), inputs[512:], inputs[:512], large.sort().values
