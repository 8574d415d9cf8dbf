"""CBQ: steps and roundings of neighbouring blocks are learned together, in windows that overlap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from fewbits.core.checks import check_group_size, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import BlockMethod, Paper, Statistics
from fewbits.core.tensor import CompressedTensor, Part
from fewbits.formats.diagonal import DiagonalScale
from fewbits.formats.ranges import fit_groups
from fewbits.formats.uniform import Uniform
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.learned_activation import ScaledTokenQuantizer
from fewbits.layers.linear import StoredLinear
from fewbits.layers.straight_through import round_through, straight_through
from fewbits.solvers.adaround import annealed_power, rounding_penalty, soft_rounding, start_logits
from fewbits.solvers.error_feedback import error_feedback, factorize_ordered
from fewbits.solvers.outliers import largest_reserved
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.ranges import Ranges

_SETTLING = 0.25  # share of a block's first window in which its steps are learned; rounding is learned after it


@dataclass(frozen=True)
class Cbq(BlockMethod):
    """Weights go up or down by learned choices whose logits are a low-rank product added to the weight's own fraction.

    Before training, outliers of weights are cut off and input channels that are outliers are scaled into the weight. In a
    block's first window the steps are learned first; the choices are then between floor(w / s), as it is at that moment, and
    one above. Stored: one uniform term with fp16 scales and integer zero points; a diagonal scale of the input where channels
    were outliers; with `activation_bits` the quantizer of the inputs. Departures: see the page; the paper leaves much open and
    has no public code. Raises InputError for values out of range.
    """

    bits: int = 2
    group_size: int | None = 64
    rank: int = 5
    rounding: Literal["low_rank", "full", "none", "random"] = "low_rank"
    start: Literal["weight", "feedback"] = "weight"  # of the choices: the weight itself, or halfway to error feedback's
    truncate: bool = True
    scale_inputs: bool = True
    activation_bits: int | None = None
    step_rate: float = 1e-2  # share of a step
    rounding_rate: float = 3e-2
    regularization: float = 1e-4
    divergence: float = 0.01  # weight of the softmax divergence of hidden states
    steps: int = 80
    window: int = 2
    overlap: int = 1
    batch_size: int = 4
    seed: int = 0

    paper: ClassVar[Paper] = Paper("CBQ: Cross-Block Quantization for Large Language Models", "2312.07950", 2023)
    baseline: ClassVar[str | None] = "gptq"
    needs: ClassVar = (Hessian, Ranges)

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_group_size(self.group_size)
        check_range("rank", self.rank, 1, 10**4)
        check_range("steps", self.steps, 0, 10**6)
        if self.rounding not in ("low_rank", "full", "none", "random"):
            raise InputError(f"rounding={self.rounding!r} is not known; 'low_rank', 'full', 'none' or 'random' would be right")
        if self.start not in ("weight", "feedback"):
            raise InputError(f"start={self.start!r} is not known; 'weight' or 'feedback' would be right")
        if self.activation_bits is not None:
            check_range("activation_bits", self.activation_bits, 2, 16)

    def begin(self, weight: Tensor, bias: Tensor | None, statistics: Statistics) -> nn.Module:
        return self.begin_group({"weight": weight}, {"weight": bias}, statistics)["weight"]

    def begin_group(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor | None], statistics: Statistics
    ) -> dict[str, nn.Module]:
        inverse = torch.ones(next(iter(weights.values())).shape[1], dtype=torch.float16)
        if self.scale_inputs:
            inverse = (1 / _channel_scale(statistics[Ranges].largest_magnitude)).half()
        hessian = None
        if self.start == "feedback":
            hessian = statistics[Hessian].matrix * torch.outer(inverse.float(), inverse.float())  # of the inputs as they are read
        return {name: _Rounded(self, weight, inverse, biases[name], hessian) for name, weight in weights.items()}

    def loss(self, outputs: Tensor, dense: Tensor, mixed: Tensor) -> Tensor:
        """Squared distance and divergence of the hidden states, to both targets (section 3.2)."""
        return self._distance(outputs, dense) + self._distance(outputs, mixed)

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        ours, theirs = ours.float(), theirs.float()
        squared = (ours - theirs).square().mean() / theirs.square().mean().clamp(min=1e-12)
        if not self.divergence:
            return squared
        first, second = (torch.log_softmax(states, dim=-1) for states in (ours, theirs))
        return squared + self.divergence * (first.exp() * (first - second)).sum(-1).mean()


def _channel_scale(magnitude: Tensor) -> Tensor:
    """c [features]: the root of how far a channel lies above the largest that is no outlier; 1 for the others."""
    reserved = largest_reserved(magnitude).clamp(min=1e-12)
    return torch.where(magnitude > reserved, (magnitude / reserved).sqrt(), 1.0)


class _Rounded(LearnedLinear):
    """w = s (clamp(floor(w / s) + h + z) - z) with h between 0 and 1; learned: steps s, then the logits of h."""

    def __init__(self, method: Cbq, weight: Tensor, inverse: Tensor, bias: Tensor | None, hessian: Tensor | None) -> None:
        super().__init__(bias)
        self.method, (rows, columns) = method, weight.shape
        self.size = min(method.group_size or columns, columns)
        scaled = weight / inverse.float()  # the inputs are multiplied by `inverse`
        if method.truncate:
            limit = largest_reserved(scaled.abs())
            scaled = scaled.clamp(-limit, limit)
        scales, zeros = fit_groups(scaled, method.bits, self.size, search="mse")
        self.register_buffer("dense", scaled)
        self.register_buffer("inverse", inverse)
        self.register_buffer("zeros", zeros)
        self.register_buffer("hessian", hessian)
        self.register_buffer("base", torch.zeros_like(scaled))  # floor(w / s) and the logits of its fraction, once s is frozen
        self.register_buffer("start", torch.zeros_like(scaled))
        self.register_buffer("frozen", torch.zeros(1))
        self.register_buffer("hard", torch.zeros(1))
        self.log_scales = nn.Parameter(scales.log())
        generator = torch.Generator().manual_seed(method.seed)
        rank = method.rank
        self.first = nn.Parameter(torch.randn(rows, rank, generator=generator) / rank**0.5) if method.rounding == "low_rank" else None
        self.second = nn.Parameter(torch.zeros(rank, columns)) if method.rounding == "low_rank" else None
        self.logits = nn.Parameter(torch.zeros(rows, columns)) if method.rounding == "full" else None
        self.share = nn.Parameter(torch.ones(1)) if method.activation_bits is not None else None
        self.power: float | None = None

    def scales(self) -> Tensor:
        """`[rows, groups]`, as they will be stored."""
        scales = self.log_scales.exp()
        return straight_through(scales, scales.detach().half().float())

    def soft(self) -> Tensor:
        """h `[rows, columns]`, the share of the way from the level below to the one above."""
        if self.first is not None and self.second is not None:
            return soft_rounding(self._buffer("start") + self.first @ self.second)
        if self.logits is not None:
            return soft_rounding(self._buffer("start") + self.logits)
        return (self._buffer("start") > 0).float()

    def weight(self) -> Tensor:
        if not bool(self._buffer("frozen")):
            # The steps are learned with rounding to nearest, whose gradient passes straight through (LSQ).
            scales = self._spread(self.scales())
            codes = (round_through(self._buffer("dense") / scales) + self._spread(self._buffer("zeros"))).clamp(0, self._largest())
            return self._restored((codes - self._spread(self._buffer("zeros"))) * scales)
        soft = self.soft()
        if bool(self._buffer("hard")):
            soft = (soft >= 0.5).float()
        codes = (self._buffer("base") + soft).clamp(0, self._largest())
        return self._restored((codes - self._spread(self._buffer("zeros"))) * self._spread(self.scales()))

    def advance(self, progress: float, leaving: bool) -> None:
        if not bool(self._buffer("frozen")) and progress >= _SETTLING:
            self.freeze()
        # A choice that is made cannot be unmade: choices are pushed only in the last window of a block.
        self.power = annealed_power(progress, warmup=0.4) if leaving and bool(self._buffer("frozen")) else None

    def freeze(self) -> None:
        """From now on the steps stay; rounding starts at the weight itself, or halfway to what error feedback chooses."""
        method = self.method
        with torch.no_grad():
            ratio = self._buffer("dense") / self._spread(self.scales())
            below = ratio.floor()
            self._buffer("base").copy_(below + self._spread(self._buffer("zeros")))
            share = ratio - below
            if method.start == "feedback":
                share = (share + self._by_feedback(ratio, below)) / 2  # rounds as error feedback does, and is still free
            start = start_logits(share)
            if method.rounding == "random":
                start = torch.randn(start.shape, generator=torch.Generator().manual_seed(method.seed))
            self._buffer("start").copy_(start)
            self._buffer("frozen").fill_(1)

    def _by_feedback(self, ratio: Tensor, below: Tensor) -> Tensor:
        """1 where error feedback goes up, 0 where it goes down, `[rows, columns]`; `ratio` is w / s and `below` its floor."""
        factor, order = factorize_ordered(self._buffer("hessian"), 0.01, by_strength=True)
        scales, zeros = self._spread(self.scales().detach()), self._spread(self._buffer("zeros"))
        choices = torch.empty_like(ratio)

        def quantize(j: int, column: Tensor, _: Tensor) -> Tensor:
            at = int(order[j])
            choices[:, at] = (column / scales[:, at] - below[:, at] >= 0.5).float()
            return ((below[:, at] + choices[:, at] + zeros[:, at]).clamp(0, self._largest()) - zeros[:, at]) * scales[:, at]

        error_feedback((ratio * scales)[:, order], factor, quantize)
        return choices

    def penalty(self) -> Tensor:
        if self.power is None or (self.first is None and self.logits is None):
            return torch.zeros(())
        free = (self._buffer("base") >= 0) & (self._buffer("base") < self._largest())  # what is clipped has no choice
        return self.method.regularization * rounding_penalty(self.soft()[free], self.power) / self.dense_size()

    def dense_size(self) -> int:
        """Of the layer's rows: the penalty is a mean over rows, so that layers of all widths are pushed alike."""
        return self._buffer("dense").shape[0]

    def groups(self) -> list[dict[str, Any]]:
        choices = [one for one in (self.first, self.second, self.logits) if one is not None]
        return [
            {"params": [self.log_scales], "lr": self.method.step_rate},
            {"params": choices, "lr": self.method.rounding_rate},
            {"params": [] if self.share is None else [self.share], "lr": self.method.step_rate},
        ]

    def harden(self) -> None:
        if not bool(self._buffer("frozen")):
            self.freeze()
        self._buffer("hard").fill_(1)

    def round_inputs(self, inputs: Tensor) -> Tensor:
        if self.share is None:
            return inputs
        scaled = inputs * self._buffer("inverse").to(inputs.dtype)
        most = 2 ** (cast(int, self.method.activation_bits) - 1) - 1
        step = (scaled.float().abs().amax(-1, keepdim=True) * self.share / most).clamp(min=1e-30)
        rounded = round_through(scaled.float() / step).clamp(-most, most) * step
        return (rounded / self._buffer("inverse").float()).to(inputs.dtype)

    def finish(self) -> StoredLinear:
        codes = (self._buffer("base") + (self.soft() >= 0.5).float()).clamp(0, self._largest()).to(torch.uint8)
        zeros = self._buffer("zeros").to(torch.uint8)
        scales = self.scales().detach().half()
        term = Uniform.from_codes(codes, scales, zeros, bits=self.method.bits, group_size=self.size)
        inverse = self._buffer("inverse")
        transforms = () if bool((inverse == 1).all()) else (DiagonalScale(inverse.clone()),)
        activation: Part | None = None
        if self.share is not None:
            activation = ScaledTokenQuantizer(self.share.detach().clone(), cast(int, self.method.activation_bits))
        return StoredLinear(CompressedTensor((term,), transforms), activation)

    def _restored(self, scaled: Tensor) -> Tensor:
        """In the space of the layer's own inputs."""
        return scaled * self._buffer("inverse").float()

    def _largest(self) -> int:
        return int(2**self.method.bits - 1)

    def _spread(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.size, dim=1)[:, : self._buffer("dense").shape[1]]

    def _buffer(self, name: str) -> Tensor:
        return self.get_buffer(name)
