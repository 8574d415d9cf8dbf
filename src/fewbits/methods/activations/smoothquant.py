"""SmoothQuant: the outliers of activations are moved into the weights, until both round well to 8 bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from fewbits.core.checks import check_range
from fewbits.core.errors import InputError
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.diagonal import DiagonalScale
from fewbits.formats.ranges import fit_uniform, round_codes
from fewbits.formats.uniform import Uniform
from fewbits.layers.activation import TokenQuantizer
from fewbits.layers.static_activation import StaticQuantizer
from fewbits.solvers.smoothing import smoothing_scale
from fewbits.statistics.ranges import Ranges

Granularity = Literal["token", "tensor", "static"]


@dataclass(frozen=True)
class Smoothquant(LayerMethod):
    """Linears that read one input share a scale; weights get one scale a row, activations one a token (O1), a batch (O2), or one
    that calibration found, once and for all (O3, `granularity="static"`).

    Stored: symmetric 8-bit codes with fp16 scales inside a diagonal scale of the input, and the activation quantizer.
    Departures: every linear is smoothed, not those after a norm alone.
    Raises InputError for values out of range.
    """

    bits: int = 8
    activation_bits: int = 8
    strength: float = 0.5
    granularity: Granularity = "token"

    paper: ClassVar[Paper] = Paper(
        "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", "2211.10438", 2022
    )
    baseline: ClassVar[str | None] = "rtn"
    needs: ClassVar = (Ranges,)

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        if not 0 <= self.strength <= 1:
            raise InputError(f"strength={self.strength} is out of range; 0 to 1, such as 0.5, would be right")
        TokenQuantizer(self.activation_bits)
        if self.granularity not in get_args(Granularity):
            raise InputError(f"granularity={self.granularity!r} is not known; 'token', 'tensor' or 'static' would be right")

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        return self.compress_group({"weight": weight}, statistics)["weight"]

    def compress_group(self, weights: Mapping[str, Tensor], statistics: Statistics) -> dict[str, CompressedTensor]:
        columns = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0)
        scale = smoothing_scale(statistics[Ranges].largest_magnitude, columns, self.strength)
        inverse = (1 / scale).half()
        return {name: self._round(weight / inverse.float(), inverse) for name, weight in weights.items()}

    def activation(self, statistics: Statistics, weight: CompressedTensor) -> TokenQuantizer | StaticQuantizer:
        if self.granularity != "static":
            return TokenQuantizer(self.activation_bits, self.granularity)
        smoothed = statistics[Ranges].largest_magnitude[None]
        for transform in weight.input_transforms:
            smoothed = transform.apply(smoothed)
        return StaticQuantizer.for_largest(smoothed.max(), self.activation_bits)

    def _round(self, weight: Tensor, inverse: Tensor) -> CompressedTensor:
        scale, zero = fit_uniform(weight, self.bits, symmetric=True)
        scale = scale.half()
        codes = round_codes(weight, scale.float(), zero, self.bits).to(torch.uint8)
        return CompressedTensor((Uniform.from_codes(codes, scale, None, bits=self.bits),), (DiagonalScale(inverse),))
