"""VidKV: keys in 1 or 2 bits by their channel's range, values in three levels, for the many alike tokens of a video."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.core.cache_method import CacheMethod, CacheRun, Side
from fewbits.core.checks import check_range
from fewbits.core.errors import InputError
from fewbits.core.method import Paper
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.binary import Binary
from fewbits.formats.codebook import Codebook
from fewbits.formats.coded import spread_groups
from fewbits.formats.columns import Columns
from fewbits.formats.fourier import RealFourier
from fewbits.formats.permutation import Partition
from fewbits.formats.row_classes import RowClasses, rows_of
from fewbits.formats.ternary import Ternary
from fewbits.formats.transposed import Transposed
from fewbits.formats.uniform import Uniform


@dataclass(frozen=True)
class Vidkv(CacheMethod):
    """Grids of `group_size` tokens for each channel, of keys and of values; runs of `residual` tokens behind the prompt.

    Of a head's key channels the share `key_bits` - 1 with the widest range over the first run, one choice for all heads, have 2-bit
    min-max grids. The others become spectra along the channels and keep signs and a scale. Values are ternary; those of the
    prompt's tokens at the positions `protected`, see `protection`, have 2-bit min-max grids. Stored for each run: a bit for every
    channel, a uniform term and a binary one, or a codebook of two levels, for keys; a ternary term for values, five codes a
    byte, and where tokens are protected a bit for every token and a uniform term; all scales fp16. Raises InputError for values
    out of range.
    """

    key_bits: float = 1.5  # 1 + k
    values: Literal["ternary", "signs", "grid"] = "ternary"  # "grid": 2-bit min-max for all
    group_size: int = 32
    residual: int = 128  # R; a multiple of the group size
    fourier: bool = True  # whether the 1-bit channels become spectra
    levels: Literal["signs", "published", "extremes"] = "signs"  # of 1-bit channels: -s and s; 0 and s; the group's extremes
    offset: bool = False  # whether signs lie around their group's mean, for channels far from zero
    gamma: float = 0.7  # ternary values below gamma times the group's mean magnitude are zero
    value_scale: Literal["kept", "mean", "none"] = "kept"  # mean magnitude of those kept; of all; 1 as published
    choice: Literal["range", "place"] = "range"  # of 2-bit channels; "place": evenly spread ones, for comparison
    protected: tuple = ()  # positions in the prompt, without padding, of the tokens whose values are to have 2 bits

    paper: ClassVar[Paper] = Paper("Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models", "2503.16257", 2025)
    baseline: ClassVar[str | None] = "kivi"

    def __post_init__(self) -> None:
        check_range("key_bits", self.key_bits, 1, 2)
        check_range("group_size", self.group_size, 1, 2**16)
        check_range("gamma", self.gamma, 0, 10)
        if self.residual < 1 or self.residual % self.group_size:
            raise InputError(f"residual={self.residual} is not right; a multiple of group_size={self.group_size} would be")
        if any(not isinstance(place, int) or place < 0 for place in self.protected):
            raise InputError("protected holds what is no position; whole numbers from 0 on would be right")
        if self.offset and self.levels != "signs":
            raise InputError(f"offset=True is for levels='signs', not {self.levels!r}, which say where both levels lie")

    def due(self, waiting: int, side: Side, prompt: bool) -> int:
        size = self.group_size if prompt else self.residual
        return waiting // size * size

    def settle(self, keys: Tensor, values: Tensor, run: CacheRun) -> Mapping[str, Tensor]:
        """`wide`, packed bits: which of a head's channels have 2 bits in all runs of the sequence."""
        spans = keys.unflatten(1, (run.heads, -1)).amax((0, 1)) - keys.unflatten(1, (run.heads, -1)).amin((0, 1))
        width = len(spans)
        count = int((self.key_bits - 1) * width + 1e-9)
        if self.choice == "range":
            places = spans.argsort(descending=True, stable=True)[:count]
        else:
            places = torch.arange(count) * width // max(count, 1)
        mask = torch.zeros(width, dtype=torch.bool).scatter_(0, places, True)
        return {"wide": Partition.from_mask(mask).bits_set}

    def seal_keys(self, keys: Tensor, run: CacheRun) -> CompressedTensor:
        settled = run.settled or self.settle(keys, keys, run)
        head = Partition(settled["wide"], keys.shape[1] // run.heads).mask()
        order = Partition.from_mask(head.repeat(run.heads))
        count = int(head.sum()) * run.heads
        sorted_keys = order.apply(keys)
        parts: list[Term] = []
        if count:
            parts.append(self._grid(sorted_keys[:, :count], 2))
        if count == keys.shape[1]:
            return CompressedTensor((parts[0],), (order,))
        if not self.fourier:
            parts.append(self._one_bit(sorted_keys[:, count:]))
            return CompressedTensor((Columns(tuple(parts)),), (order,))
        spectra = RealFourier(int((~head).sum()), count)
        parts.append(self._one_bit(spectra.apply(sorted_keys)[:, count:]))
        return CompressedTensor((Columns(tuple(parts)),), (order, spectra))

    def seal_values(self, values: Tensor, run: CacheRun) -> CompressedTensor:
        places = torch.tensor([place + run.padding - run.start for place in self.protected], dtype=torch.int64)
        mask = torch.zeros(1, len(values), dtype=torch.bool)
        mask[0, places[(places >= 0) & (places < len(values))]] = True
        if not bool(mask.any()):
            return CompressedTensor((self._few(values),))
        others = self._few(rows_of(values, ~mask)) if not bool(mask.all()) else None
        return CompressedTensor((RowClasses.from_mask(mask, self._grid(rows_of(values, mask), 2), others),))

    def _few(self, values: Tensor) -> Term:
        """`values [tokens, channels]` of no protected token."""
        if self.values == "grid":
            return self._grid(values, 2)
        groups = _grouped(values.T, self.group_size)
        mean = groups.abs().nanmean(2)
        if self.values == "signs":
            return Transposed(Binary.from_signs(values.T, mean.half(), group_size=self.group_size))
        kept = groups.abs() > self.gamma * mean[..., None]
        signs = torch.where(kept, groups.sign(), 0.0).flatten(1)[:, : len(values)]
        scales = {"none": None, "mean": mean, "kept": _mean_where(groups.abs(), kept)}[self.value_scale]
        return Transposed(Ternary.from_signs(signs, None if scales is None else scales.half(), group_size=self.group_size))

    def _one_bit(self, states: Tensor) -> Term:
        """`states [tokens, features]`, each feature's groups of tokens at two levels."""
        if self.levels == "extremes":
            return self._grid(states, 1)
        matrix, groups = states.T, _grouped(states.T, self.group_size)
        if self.offset:
            middle = groups.nanmean(2).half()
            rest = matrix - spread_groups(middle.float(), self.group_size, matrix.shape[1])
            scales = _grouped(rest, self.group_size).abs().nanmean(2).half()
            return Transposed(Binary.from_signs(rest, scales, middle, group_size=self.group_size))
        scales = groups.abs().nanmean(2).half()
        if self.levels == "signs":
            return Transposed(Binary.from_signs(matrix, scales, group_size=self.group_size))
        levels = torch.tensor([[[0.0, 1.0]]], dtype=torch.float16)
        return Transposed(Codebook.from_codes((matrix >= 0).to(torch.uint8), levels, scales, bits=1, group_size=self.group_size))

    def _grid(self, states: Tensor, bits: int) -> Term:
        return Transposed(Uniform.between_extremes(states.T, bits=bits, group_size=self.group_size))


def protection(embeddings: Tensor, visual: Tensor, *, share: float = 0.2, multiple: int = 32) -> tuple[int, ...]:
    """For the field `protected`: positions of the visual tokens of a prompt that are most like its text, ascending.

    `embeddings [tokens, width]` are what the first layer reads, `visual [tokens]`, bool, says which of the prompt's positions are
    visual. A visual token's score is its mean scalar product with the text tokens; the `share` with the highest, rounded to a
    `multiple`, at least one, are chosen. Raises InputError where no token is visual, as in a model of text alone, or none is text.
    """
    check_range("share", share, 0, 1)
    check_range("multiple", multiple, 1, 2**16)
    if visual.dtype != torch.bool or visual.shape != embeddings.shape[:1]:
        raise InputError(f"visual {list(visual.shape)}, {visual.dtype} is not right; bool [{len(embeddings)}] would be")
    count = int(visual.sum())
    if not count or count == len(visual):
        missing = "visual" if not count else "text"
        raise InputError(f"no token of the prompt is {missing}; a cache that protects none needs no choice")
    scores = embeddings.float() @ embeddings[~visual].float().mean(0)
    kept = min(count, max(1, round(share * count / multiple)) * multiple)
    best = scores.masked_fill(~visual, -torch.inf).argsort(descending=True, stable=True)[:kept]
    return tuple(sorted(best.tolist()))


def _grouped(matrix: Tensor, size: int) -> Tensor:
    """`[rows, groups, size]` of `matrix [rows, columns]`; a last group that is shorter ends in NaN."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % size), value=torch.nan).unflatten(1, (-1, size))


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Means over the last axis of the entries in `mask`; 0 where there are none."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
