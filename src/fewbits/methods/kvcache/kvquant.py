"""KVQuant: keys from before their rotary embedding, free levels that the loss chose, and a few entries of each token exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from torch import Tensor

from fewbits.core.cache_method import CacheMethod, CacheRun, Report, Side, silent
from fewbits.core.checks import check_range
from fewbits.core.errors import InputError
from fewbits.core.method import Paper
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.affine import Affine
from fewbits.formats.codebook import Codebook, normal_float_levels
from fewbits.formats.dense import Dense
from fewbits.formats.overlaid import Overlaid
from fewbits.formats.row_blocks import RowBlocks
from fewbits.models.cache_states import CacheStates, record_states
from fewbits.solvers.binary import end_entries
from fewbits.solvers.level_fit import fit_levels, matched_levels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Axis = Literal["channel", "token"]


@dataclass(frozen=True)
class Kvquant(CacheMethod):
    """Codes of levels shared by a layer, in ranges of each key channel, found beforehand, and of each value token, found as it comes.

    Outliers are key entries outside of their channel's range, which leaves the share `outliers` of the calibration text out, and
    equally many of the largest and the smallest entries of each value token. Levels are the weighted k-means of all normalized
    entries inside, weighted with the loss's squared gradients. Stored: packed codes, a value token's fp16 scale and center,
    outliers in fp16 with their channels, keys' number for each token, the first `sink` tokens in fp16, and once for a layer
    its levels and the channels' scales and centers. Reads the tables of `calibrate`. Raises InputError for values out of range.
    """

    bits: int = 3
    outliers: float = 0.01  # s; 0: ranges are extremes, and nothing is kept apart
    sink: int = 1  # first tokens of a sequence that stay in fp16
    levels: Literal["kmeans", "normal_float", "uniform"] = "kmeans"
    weights: Literal["scaled", "fisher", "none"] = "scaled"  # squared gradients, times the squared range (the paper) or not (its code)
    q_norm: bool = False  # levels with the mean and the spread of what they stand for
    capped_keys: bool = False  # equally many outliers in each key, as in values
    key_axis: Axis = "channel"  # "token": keys are treated as values, for comparison
    before_rotation: bool = True  # False: keys are sealed as the attention reads them, for comparison
    residual: int = 0  # newest tokens that stay exact
    iterations: int = 50  # of k-means

    calibrated: ClassVar[bool] = True
    uncalibrated_fields: ClassVar[frozenset[str]] = frozenset({"capped_keys", "residual"})
    paper: ClassVar[Paper] = Paper(
        "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization", "2401.18079", 2024
    )
    baseline: ClassVar[str | None] = "kivi"

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_range("outliers", self.outliers, 0, 0.5)
        check_range("sink", self.sink, 0, 2**10)
        check_range("residual", self.residual, 0, 2**20)
        check_range("iterations", self.iterations, 1, 10**4)

    @property
    def rotated_keys(self) -> bool:  # type: ignore[override]  # a field decides what is a constant of other methods
        return not self.before_rotation

    def due(self, waiting: int, side: Side, prompt: bool) -> int:
        return max(0, waiting - self.residual)

    def seal_keys(self, keys: Tensor, run: CacheRun) -> CompressedTensor:
        return self._seal(keys, run, "keys")

    def seal_values(self, values: Tensor, run: CacheRun) -> CompressedTensor:
        return self._seal(values, run, "values")

    def _seal(self, states: Tensor, run: CacheRun, side: Side) -> CompressedTensor:
        """The sequence's first tokens as they are, what pads them at the left as the middle of every range, all others coded."""
        behind = [min(max(run.padding + more - run.start, 0), len(states)) for more in (0, self.sink)]
        by_channel = self._by_channel(side)
        coded = self._coded_channels if by_channel else self._coded_tokens
        padding, first, rest = states.tensor_split(behind)
        parts: list[Term] = []
        if len(padding):
            middle = _table(run, side, "centers", states.shape[1]).float() if by_channel else torch.zeros(1)
            parts.append(coded(middle.expand_as(padding), run, side))
        if len(first):
            parts.append(Dense(first.half()))
        if len(rest):
            parts.append(coded(rest, run, side))
        return CompressedTensor((parts[0] if len(parts) == 1 else RowBlocks(tuple(parts)),))

    def _by_channel(self, side: Side) -> bool:
        return side == "keys" and self.key_axis == "channel"

    def _coded_channels(self, states: Tensor, run: CacheRun, side: Side) -> Term:
        """Ranges of the channels, from the tables: `states [tokens, channels]`."""
        centers, scales = (_table(run, side, name, states.shape[1]) for name in ("centers", "scales"))
        normal = (states - centers.float()) / scales.float()
        base = Affine(self._codes(normal, run, side), scales, centers, by_row=False)
        if not self.outliers:
            return base
        if self.capped_keys:
            return Overlaid.from_mask(base, states, extremes(normal, self.outliers), equal=True)
        return Overlaid.from_mask(base, states, normal.abs() > 1)

    def _coded_tokens(self, states: Tensor, run: CacheRun, side: Side) -> Term:
        """Ranges of each token, from its own entries: `states [tokens, channels]`."""
        outside = extremes(states, self.outliers)
        centers, scales = token_ranges(states, outside)
        base = Affine(self._codes((states - centers.float()[:, None]) / scales.float()[:, None], run, side), scales, centers, by_row=True)
        return Overlaid.from_mask(base, states, outside, equal=True) if self.outliers else base

    def _codes(self, normal: Tensor, run: CacheRun, side: Side) -> Codebook:
        codes = torch.bucketize(normal, _table(run, side, "edges", 2**self.bits - 1)).to(torch.uint8)
        return Codebook.from_codes(codes, _table(run, side, "levels", 2**self.bits), bits=self.bits)

    def calibrate(self, model: PreTrainedModel, windows: Tensor, report: Report = silent) -> dict[int, dict[str, Tensor]]:
        """By layer, for "keys" and "values": `levels [1, 1, 2**bits]`, the `edges` between them before Q-Norm; keys' ranges.

        Raises InputError where the windows have no token behind the sink.
        """
        if windows.ndim != 2 or windows.shape[1] < self.sink + 2:
            raise InputError(f"windows {list(windows.shape)} are too short; [count, {self.sink + 2} tokens or more] would be right")
        sloped = self.levels == "kmeans" and self.weights != "none"
        recorded = record_states(model, windows, rotated=self.rotated_keys, gradients=sloped, report=report)
        return {layer: self.fit(states) for layer, states in recorded}

    def fit(self, states: CacheStates) -> dict[str, Tensor]:
        """The tables of one layer."""
        found: dict[str, Tensor] = {}
        sides: tuple[tuple[Side, Tensor, Tensor | None], ...] = (
            ("keys", states.keys, states.key_gradients),
            ("values", states.values, states.value_gradients),
        )
        for side, numbers, slopes in sides:
            rows = numbers[:, self.sink :].flatten(0, 1)
            plain = slopes is None or self.weights == "none"
            heavy = torch.ones_like(rows) if plain else cast(Tensor, slopes)[:, self.sink :].flatten(0, 1).square()
            if self._by_channel(side):
                centers, scales = channel_ranges(rows, self.outliers)
                found |= {f"{side}.centers": centers, f"{side}.scales": scales}
                normal, wide = (rows - centers.float()) / scales.float(), scales.float()
                inside = (normal.abs() <= 1) | (self.outliers == 0)  # fp16 ranges may leave the extremes out by a bit
            else:
                outside = extremes(rows, self.outliers)
                middle, spread = (one.float()[:, None] for one in token_ranges(rows, outside))
                normal, wide, inside = (rows - middle) / spread, spread, ~outside
            heavy = heavy * wide.square() if self.weights == "scaled" else heavy
            levels, edges = self._fit_levels(normal[inside], heavy[inside])
            found |= {f"{side}.levels": levels, f"{side}.edges": edges}
        return found

    def _fit_levels(self, normal: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if self.levels == "kmeans":
            levels = fit_levels(normal, weights, 2**self.bits, iterations=self.iterations)
        else:
            levels = normal_float_levels(self.bits) if self.levels == "normal_float" else torch.linspace(-1, 1, 2**self.bits)
        levels = levels.half().float()  # what will be stored is what is rounded with
        edges = (levels[1:] + levels[:-1]) / 2
        if self.q_norm:
            levels = matched_levels(levels, normal, edges)
        return levels.half()[None, None], edges


def extremes(rows: Tensor, share: float) -> Tensor:
    """bool: of each of `rows [count, entries]` equally many of the largest and of the smallest, together about `share` of them.

    As many as lie at or beyond the quantiles share / 2 and 1 - share / 2; at least one of each, and at least one is left.
    """
    entries = rows.shape[1]
    count = min(int((entries - 1) * share / 2) + 1, (entries - 1) // 2) if share else 0
    return end_entries(rows, count)


def channel_ranges(rows: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """fp16 centers and scales `[channels]` of the quantiles share / 2 and 1 - share / 2 of each column of `rows`; share 0: extremes."""
    ordered = rows.sort(dim=0).values
    ends = []
    for place in (share / 2, 1 - share / 2):
        at = place * (len(rows) - 1)
        low = int(at)
        ends.append(torch.lerp(ordered[low], ordered[min(low + 1, len(rows) - 1)], at - low))
    return _range(*ends)


def token_ranges(rows: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """fp16 centers and scales `[rows]` of the smallest and the largest entry of each row that is not `outside`."""
    return _range(rows.masked_fill(outside, torch.inf).amin(1), rows.masked_fill(outside, -torch.inf).amax(1))


def _range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Where both ends are one number, the scale is what fp16 may take from it."""
    centers = ((high + low) / 2).half()
    least = (centers.float().abs() * 2**-10).clamp(min=1e-6)
    return centers, torch.maximum((high - low) / 2, least).half()


def _table(run: CacheRun, side: Side, name: str, size: int) -> Tensor:
    """The layer's own tensor, which all runs share. Raises InputError where the run's tables hold none of `size` numbers."""
    found = run.tables.get(f"{side}.{name}")
    if found is None or found.numel() != size:
        held = "no" if found is None else f"{found.numel()}"
        raise InputError(f"layer {run.layer}: the tables hold {held} {side}.{name}, not {size}; calibrate for this model and these bits")
    return found
