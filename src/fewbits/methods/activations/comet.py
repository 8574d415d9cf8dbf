"""COMET: input channels with outliers share as few blocks as can be; those blocks have 8 bits, all others 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from fewbits.core.checks import check_group_size, check_positive, check_range
from fewbits.core.config import configure, read_spec
from fewbits.core.errors import InputError
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.published import LLAMA2_AT_4K, Figure, Published
from fewbits.core.registry import get_method
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.diagonal import DiagonalScale
from fewbits.formats.front import Front
from fewbits.formats.ranges import fit_groups
from fewbits.formats.uniform import Uniform
from fewbits.layers.block_activation import BlockQuantizer
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.moments import Moments
from fewbits.statistics.ranges import Ranges
from fewbits.statistics.reordered import reordered
from fewbits.statistics.sample import Sample

Granularity = Literal["token", "static"]
_WHOLE_MODEL = ("activation", "offset", "plan", "profiling", "stacking", "tuning")  # what the weights' method may not do beside rounding


@dataclass(frozen=True)
class Comet(LayerMethod):
    """Channels whose largest magnitude exceeds `threshold` times the median channel's come first, for all linears of one input.

    Blocks of `block_size` channels with such a channel have `outlier_bits`, the others `activation_bits`, each token and block an
    fp16 scale (`granularity="static"`: one a block that calibration found). `weights` names the method, with its fields, that
    rounds the weight: behind the permutation, in groups that are the blocks, symmetric. With `tolerance` the outliers are
    instead the largest channels, as many blocks of them as keep the layers' output error within 1 + tolerance of that at
    `outlier_bits` everywhere. Stored: the weight inside the list of outlier channels, one bit a block. `permute=False`
    leaves channels where they are, for comparison. Raises InputError for values out of range.
    """

    bits: int = 4
    block_size: int = 128
    activation_bits: int = 4
    outlier_bits: int = 8
    threshold: float = 6.0
    tolerance: float | None = None
    permute: bool = True
    granularity: Granularity = "token"
    weights: str = "gptq"

    paper: ClassVar[Paper] = Paper("COMET: Towards Practical W4A4KV4 LLMs Serving", "2410.12168", 2024)
    published: ClassVar = Published(
        own=Figure("W4Ax, 84 % of the blocks at 4 bits", 5.71, None, "comet:block_size=32"),
        rivals=(Figure("W4A4", 14.26, 4, "comet:block_size=32,outlier_bits=4"),),
        **LLAMA2_AT_4K,
        setting="blocks of 32 channels, not 128, as a small model has few",
    )
    baseline: ClassVar[str | None] = "smoothquant"
    needs: ClassVar = (Hessian, Moments, Ranges, Sample)

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 2, 8)
        check_group_size(self.block_size, "block_size")
        check_range("activation_bits", self.activation_bits, 2, 8)
        check_range("outlier_bits", self.outlier_bits, self.activation_bits, 8)
        check_positive("threshold", self.threshold, 6.0)
        if self.tolerance is not None:
            check_range("tolerance", self.tolerance, 0, 1e6)
            if not self.permute:
                raise InputError("tolerance chooses whole blocks of permuted channels; permute=True, or no tolerance, would be right")
        if self.granularity not in get_args(Granularity):
            raise InputError(f"granularity={self.granularity!r} is not known; 'token' or 'static' would be right")
        self.weight_method()

    def weight_method(self) -> LayerMethod:
        """The method that rounds permuted weights. Raises InputError for one that does more than that."""
        name, given = read_spec(self.weights)
        method = get_method(name)
        if not issubclass(method, LayerMethod) or method is Comet or method.uses_gradients or not set(method.needs) <= set(self.needs):
            raise InputError(f"weights={self.weights!r} does not round single layers from their inputs; 'gptq' or 'rtn' would be right")
        if any(getattr(method, part) is not getattr(LayerMethod, part) for part in _WHOLE_MODEL):
            raise InputError(f"weights={self.weights!r} does more than round a weight; 'gptq' or 'rtn' would be right")
        known = {field.name for field in fields(cast(Any, method))}
        ours = {"bits": self.bits, "group_size": self.block_size}
        if taken := ours.keys() & given.keys():
            raise InputError(f"weights={self.weights!r}: {', '.join(sorted(taken))} would be right as comet's own bits and block_size")
        if missing := ours.keys() - known:
            raise InputError(f"weights={self.weights!r} has no {', '.join(sorted(missing))}; 'gptq' or 'rtn' would be right")
        return configure(method, ours | ({"symmetric": True} if "symmetric" in known else {}) | given)

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        return self.compress_group({"weight": weight}, statistics)["weight"]

    def compress_group(self, weights: Mapping[str, Tensor], statistics: Statistics) -> dict[str, CompressedTensor]:
        first = self.outliers(weights, statistics) if self.permute else torch.empty(0)
        method, features = self.weight_method(), next(iter(weights.values())).shape[1]
        if not len(first):
            return {name: _checked(tensor) for name, tensor in method.compress_group(weights, statistics).items()}
        front = Front.from_first(first, features)
        order = front.order()
        made = method.compress_group(
            {name: weight[:, order].contiguous() for name, weight in weights.items()}, reordered(statistics, order, method.needs)
        )
        return {name: replace(_checked(tensor), input_transforms=(front, *tensor.input_transforms)) for name, tensor in made.items()}

    def activation(self, statistics: Statistics, weight: CompressedTensor) -> BlockQuantizer:
        magnitudes = statistics[Ranges].largest_magnitude
        marked = torch.zeros(len(magnitudes), dtype=torch.bool)
        if not self.permute:
            marked[outlier_channels(magnitudes, self.threshold)] = True
        elif weight.input_transforms and isinstance(weight.input_transforms[0], Front):
            marked[: weight.input_transforms[0].first.numel()] = True
        wide = torch.stack([block.any() for block in marked.split(self.block_size)])
        largest = None
        if self.granularity == "static":
            largest = magnitudes
            for transform in weight.input_transforms:
                largest = transform.apply(largest)
        bits = (self.activation_bits, self.outlier_bits)
        return BlockQuantizer.from_blocks(wide, len(magnitudes), self.block_size, bits=bits, largest=largest)

    def outliers(self, weights: Mapping[str, Tensor], statistics: Statistics) -> Tensor:
        """The channels that come first, int64 `[count]`, by falling magnitude."""
        magnitudes = statistics[Ranges].largest_magnitude
        if self.tolerance is None:
            return outlier_channels(magnitudes, self.threshold)
        falling, features = magnitudes.argsort(descending=True, stable=True), len(magnitudes)
        inputs, blocks = statistics[Sample].inputs, -(-features // self.block_size)
        allowed = (1 + self.tolerance) * self._loss(weights, inputs, falling)
        for count in range(0, blocks * self.block_size, self.block_size):
            if self._loss(weights, inputs, falling[:count]) <= allowed:
                return falling[:count]
        return falling

    def _loss(self, weights: Mapping[str, Tensor], inputs: Tensor, first: Tensor) -> float:
        """Squared error of all outputs for `inputs [tokens, features]` with `first` in front, weights rounded to nearest."""
        order = Front.from_first(first, inputs.shape[1]).order()
        size = min(self.block_size, inputs.shape[1])
        wide = torch.arange(0, inputs.shape[1], size) < len(first)
        moved = inputs[:, order]
        rounded = BlockQuantizer.from_blocks(wide, inputs.shape[1], size, bits=(self.activation_bits, self.outlier_bits)).apply(moved)
        total = 0.0
        for weight in weights.values():
            scales, zeros = fit_groups(weight[:, order], self.bits, size, symmetric=True)
            term = Uniform.nearest(weight[:, order], scales, zeros, bits=self.bits, group_size=size, symmetric=True)
            total += float((inputs @ weight.T - term.matmul(rounded)).square().sum())
        return total


def outlier_channels(magnitudes: Tensor, threshold: float) -> Tensor:
    """Those of `magnitudes [features]` above `threshold` times the median, by falling magnitude, int64.

    Channels that were never anything but zero do not count in the median.
    """
    alive = magnitudes[magnitudes > 0]
    if not len(alive):
        return torch.empty(0, dtype=torch.int64)
    falling = magnitudes.argsort(descending=True, stable=True)
    return falling[magnitudes[falling] > threshold * alive.median()]


def _checked(tensor: CompressedTensor) -> CompressedTensor:
    """Raises InputError where the weight's own method moves channels between blocks."""
    if not all(isinstance(transform, DiagonalScale) for transform in tensor.input_transforms):
        raise InputError("the weights' method moves channels to other blocks; one without an order of its own would be right")
    return tensor
