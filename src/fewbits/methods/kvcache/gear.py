"""GEAR: a quantized cache, plus what it lacks as a low-rank matrix for each head, plus a few outliers."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.core.cache_method import CacheMethod, CacheRun, Side
from fewbits.core.checks import check_range
from fewbits.core.errors import InputError
from fewbits.core.method import Paper
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.columns import Columns
from fewbits.formats.dense import Dense
from fewbits.formats.lowrank import LowRank
from fewbits.formats.sparse import Pattern
from fewbits.formats.transposed import Transposed
from fewbits.formats.uniform import Uniform
from fewbits.solvers.binary import end_entries
from fewbits.solvers.power_iteration import power_factors


@dataclass(frozen=True)
class Gear(CacheMethod):
    """X = D + L + S: min-max grids, factors of rank `rank` for each head, and the `outliers` share of largest and smallest entries.

    Outliers are taken for each channel of the keys and each token of the values; their vector's mean stands in for them on the
    grid. `layout` "kivi" has grids of `group_size` tokens (keys) or channels (values), "kcvt" one for each channel or token.
    Stored for each run: a uniform term, fp16 factors for each head, and fp16 outliers with packed positions, which hold what the
    other two lack there. Raises InputError for values out of range.
    """

    bits: int = 2
    group_size: int = 64
    layout: Literal["kivi", "kcvt"] = "kivi"
    prompt_rank: int = 4
    rank: int = 2  # of runs behind the prompt
    outliers: float = 0.02  # s; 0 is GEAR-L
    buffer: int = 64  # n_b: exact tokens that are sealed together
    rounds: int = 3  # of power iteration
    per_head: bool = True  # False: one pair of factors for all heads, for comparison

    paper: ClassVar[Paper] = Paper(
        "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM", "2403.05527", 2024
    )
    baseline: ClassVar[str | None] = "kivi"

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_range("group_size", self.group_size, 1, 2**16)
        check_range("prompt_rank", self.prompt_rank, 0, 2**10)
        check_range("rank", self.rank, 0, 2**10)
        check_range("outliers", self.outliers, 0, 0.5)
        check_range("buffer", self.buffer, 1, 2**16)
        check_range("rounds", self.rounds, 1, 100)
        if self.layout == "kivi" and self.buffer % self.group_size:
            raise InputError(f"buffer={self.buffer} is not right; a multiple of group_size={self.group_size} would be")

    def due(self, waiting: int, side: Side, prompt: bool) -> int:
        return waiting // self.buffer * self.buffer

    def seal_keys(self, keys: Tensor, run: CacheRun) -> CompressedTensor:
        return self._seal(keys.T, run, transposed=True)

    def seal_values(self, values: Tensor, run: CacheRun) -> CompressedTensor:
        return self._seal(values, run, transposed=False)

    def _seal(self, vectors: Tensor, run: CacheRun, transposed: bool) -> CompressedTensor:
        """`vectors [vectors, entries]`: those that share grids and outliers, the channels of keys or the tokens of values."""
        outside = end_entries(vectors, int(self.outliers * vectors.shape[1] / 2))
        inside = torch.where(outside, 0.0, vectors).sum(1, keepdim=True) / (~outside).sum(1, keepdim=True)
        size = vectors.shape[1] if self.layout == "kcvt" else min(self.group_size, vectors.shape[1])
        backbone = Uniform.between_extremes(torch.where(outside, inside, vectors), bits=self.bits, group_size=size)
        lacking = vectors - backbone.decode()
        terms: list[Term] = [Transposed(backbone) if transposed else backbone]
        rank = self.prompt_rank if run.prompt else self.rank
        if rank:
            residual = torch.where(outside, 0.0, lacking)
            low = self._factors(residual.T if transposed else residual, run.heads, rank)
            lacking = lacking - (low.decode().T if transposed else low.decode())
            terms.append(low)
        count = int(outside[0].sum())
        if count:
            values = Dense(lacking[outside].view(len(vectors), count).half())
            kept = Pattern.from_mask(outside, values, kept=count, span=vectors.shape[1])
            terms.append(Transposed(kept) if transposed else kept)
        return CompressedTensor(tuple(terms))

    def _factors(self, residual: Tensor, heads: int, rank: int) -> Columns:
        """Of `residual [tokens, channels]`, a term for each head."""
        parts = residual.view(len(residual), heads if self.per_head else 1, -1).transpose(0, 1)
        left, right = power_factors(parts, rank, rounds=self.rounds)
        return Columns(tuple(LowRank(Dense(a.half().contiguous()), Dense(b.half().contiguous())) for a, b in zip(left, right, strict=True)))
