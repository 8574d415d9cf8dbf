"""KIVI: keys in groups of tokens for each channel, values in groups of channels for each token; the baseline of every cache method."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbits.core.cache_method import CacheMethod, CacheRun, Side
from fewbits.core.checks import check_range
from fewbits.core.errors import InputError
from fewbits.core.method import Paper
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.transposed import Transposed
from fewbits.formats.uniform import Uniform


@dataclass(frozen=True)
class Kivi(CacheMethod):
    """Min-max grids of `group_size` tokens for each key channel, and of `group_size` channels for each value token.

    Keys are sealed once `residual` of them wait, all at once; of the values the last `residual` tokens stay exact. Stored: one
    uniform term a run, transposed for keys, with fp16 scales and real fp16 zero points. Departure: append-only, where the
    implementation in transformers rounds its history anew. Raises InputError for values out of range.
    """

    bits: int = 2
    group_size: int = 32
    residual: int = 128  # R; a multiple of the group size

    paper: ClassVar[Paper] = Paper("KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", "2402.02750", 2024)

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_range("group_size", self.group_size, 1, 2**16)
        if self.residual < 1 or self.residual % self.group_size:
            raise InputError(f"residual={self.residual} is not right; a multiple of group_size={self.group_size} would be")

    def due(self, waiting: int, side: Side, prompt: bool) -> int:
        return waiting // self.residual * self.residual if side == "keys" else max(0, waiting - self.residual)

    def seal_keys(self, keys: Tensor, run: CacheRun) -> CompressedTensor:
        return CompressedTensor((Transposed(Uniform.between_extremes(keys.T, bits=self.bits, group_size=self.group_size)),))

    def seal_values(self, values: Tensor, run: CacheRun) -> CompressedTensor:
        size = min(self.group_size, values.shape[1])
        return CompressedTensor((Uniform.between_extremes(values, bits=self.bits, group_size=size),))
