"""Rotated cache: a Hadamard rotation spreads outlier channels over all channels before each token's are rounded."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbits.core.cache_method import CacheMethod, CacheRun, Side
from fewbits.core.checks import check_range
from fewbits.core.method import Paper
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.rotation import Hadamard
from fewbits.formats.uniform import Uniform


@dataclass(frozen=True)
class Rotated(CacheMethod):
    """Min-max grids of `group_size` rotated channels for each token, of keys and of values; the last `residual` tokens stay exact.

    Stored: a uniform term with fp16 scales and real fp16 zero points inside a rotation, which has no tensors. Departure: one
    rotation runs over the channels of all heads, where the paper has one for each head. `rotate=False` leaves it out, for
    comparison. Raises InputError for values out of range, and where the channels are no power of two times 1, 12, 20 or 28.
    """

    bits: int = 4
    group_size: int = 128
    residual: int = 128
    rotate: bool = True

    paper: ClassVar[Paper] = Paper("QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", "2404.00456", 2024)
    baseline: ClassVar[str | None] = "kivi"

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_range("group_size", self.group_size, 1, 2**16)
        check_range("residual", self.residual, 0, 2**20)

    def due(self, waiting: int, side: Side, prompt: bool) -> int:
        return max(0, waiting - self.residual)

    def seal_keys(self, keys: Tensor, run: CacheRun) -> CompressedTensor:
        return self._seal(keys)

    def seal_values(self, values: Tensor, run: CacheRun) -> CompressedTensor:
        return self._seal(values)

    def _seal(self, states: Tensor) -> CompressedTensor:
        channels = states.shape[1]
        rotation = (Hadamard(channels),) if self.rotate else ()
        turned = rotation[0].apply(states) if rotation else states
        return CompressedTensor((Uniform.between_extremes(turned, bits=self.bits, group_size=min(self.group_size, channels)),), rotation)
