"""ZipCache: tokens that are much attended to get more bits; who sees a token is counted, so that early tokens are not favoured."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.core.cache_method import CacheMethod, CacheRun, Side
from fewbits.core.checks import check_range
from fewbits.core.errors import InputError
from fewbits.core.method import Paper
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.diagonal import DiagonalScale
from fewbits.formats.row_classes import RowClasses, rows_of
from fewbits.formats.transposed import Transposed
from fewbits.formats.uniform import Uniform


@dataclass(frozen=True)
class Zipcache(CacheMethod):
    """The `low_share` tokens of each head with the least normalized attention in `low_bits`, the others in `high_bits`.

    A token's score is the attention that `probe_share` of the queries give it, over how many of them see it. Keys have one
    min-max grid for every channel and class; values one for every token over the channels of all heads, after a division by
    channel scales: the square root of the largest magnitude. Stored for each run: a bit for every token and head, two uniform
    terms, transposed for keys, with fp16 scales and real fp16 zero points, and for values fp16 channel scales. Raises
    InputError for values out of range, and where nobody measured the attention.
    """

    low_share: float = 0.6  # r
    low_bits: int = 2
    high_bits: int = 4
    probe_share: float = 0.1
    gap: int = 100  # exact tokens behind the prompt that are sealed together
    per_head: bool = True  # False: one set of tokens for all heads of a layer
    scaling: Literal["root", "max", "none"] = "root"  # of value channels

    paper: ClassVar[Paper] = Paper(
        "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification", "2405.14256", 2024
    )
    baseline: ClassVar[str | None] = "kivi"
    uses_salience: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("low_share", self.low_share, 0, 1)
        check_range("low_bits", self.low_bits, 1, 8)
        check_range("high_bits", self.high_bits, 1, 8)
        check_range("probe_share", self.probe_share, 0, 1)
        check_range("gap", self.gap, 1, 2**16)

    def due(self, waiting: int, side: Side, prompt: bool) -> int:
        return waiting if prompt else waiting // self.gap * self.gap

    def seal_keys(self, keys: Tensor, run: CacheRun) -> CompressedTensor:
        return CompressedTensor((self._classes(keys, run, transposed=True),))

    def seal_values(self, values: Tensor, run: CacheRun) -> CompressedTensor:
        if self.scaling == "none":
            return CompressedTensor((self._classes(values, run, transposed=False),))
        largest = values.abs().amax(0)
        scale = largest.sqrt() if self.scaling == "root" else largest
        scale = torch.where(scale < 6.2e-5, 1.0, scale).half()  # a channel of nothing, or of what fp16 cannot divide by
        return CompressedTensor((self._classes(values / scale.float(), run, transposed=False),), (DiagonalScale(scale),))

    def salient(self, run: CacheRun, tokens: int) -> Tensor:
        """bool `[heads or 1, tokens]`: of the text all but the floor(low_share * tokens) least attended ones, of equals the earlier."""
        if run.salience is None:
            raise InputError("nobody measured the attention to these tokens; a cache that fewbits.caches.open makes does")
        padding = _padding(run, tokens)
        scores = run.salience if self.per_head else run.salience.sum(0, keepdim=True)
        scores = torch.nn.functional.pad(scores[:, padding:], (padding, 0), value=-1.0)  # below every attention
        least = scores.argsort(dim=1, stable=True)[:, : padding + int(self.low_share * (tokens - padding) + 1e-9)]
        return torch.ones_like(scores, dtype=torch.bool).scatter_(1, least, False)

    def _classes(self, states: Tensor, run: CacheRun, transposed: bool) -> RowClasses:
        salient, padding = self.salient(run, len(states)), _padding(run, len(states))
        high, low = rows_of(states, salient), rows_of(states, ~salient)
        if len(low) > padding:
            low[:padding] = low[padding]  # padding stands first in its class, and must not widen its ranges
        return RowClasses.from_mask(salient, self._grid(high, self.high_bits, transposed), self._grid(low, self.low_bits, transposed))

    def _grid(self, states: Tensor, bits: int, transposed: bool) -> Term | None:
        """`states [tokens of one class, channels]`; None where there are none."""
        if not len(states):
            return None
        matrix = states.T if transposed else states
        grid = Uniform.between_extremes(matrix, bits=bits, group_size=matrix.shape[1])
        return Transposed(grid) if transposed else grid


def _padding(run: CacheRun, tokens: int) -> int:
    """How many of the run's first tokens are no text."""
    return min(max(run.padding - run.start, 0), tokens)
