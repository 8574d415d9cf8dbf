"""Codes and codebooks of additive quantization, fitted to a layer's outputs.

Source: AQLM (arXiv 2401.06118), section 3.2: codes by beam search on tr(D H D^T), D = decoded - weight, then codebooks and
scales with the codes fixed, in turns. Codebooks are found by conjugate gradients, where AQLM takes 100 steps of Adam: for fixed
codes and scales the loss is quadratic in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.formats.additive import decode_additive
from fewbits.solvers.vector_kmeans import cluster_vectors

_GROUPS_AN_ENTRY = 8  # a codebook has no more entries than a share of the groups that it is for


@dataclass(frozen=True)
class Scheme:
    """Codebooks, their entries, and the neighbouring columns that share a code; raises InputError for values out of range."""

    books: int
    entries: int
    unit: int

    def __post_init__(self) -> None:
        if self.books < 1 or self.unit < 1 or not 2 <= self.entries <= 2**16:
            raise InputError(f"{self.books} codebooks of {self.entries} entries for {self.unit} columns are out of range")


def scheme_for(weight: Tensor, books: int, book_bits: int, unit: int) -> Scheme:
    """Codebooks of 2**book_bits entries, or of the power of two that is an eighth of the groups of `weight [rows, columns]`."""
    groups = weight.shape[0] * -(-weight.shape[1] // unit)
    most = max(2, 2 ** ((groups // _GROUPS_AN_ENTRY).bit_length() - 1))
    return Scheme(books, min(2**book_bits, most), unit)


@dataclass(frozen=True)
class Additives:
    """`codes [rows, groups, books]`, `codebooks [books, entries, unit]`, `scales [rows, 1]`."""

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    def decode(self, columns: int) -> Tensor:
        """`[rows, columns]`."""
        return decode_additive(self.codes, self.codebooks, columns) * self.scales

    def loss(self, weight: Tensor, hessian: Tensor) -> float:
        """tr(D H D^T)."""
        difference = self.decode(weight.shape[1]) - weight
        return float(((difference @ hessian) * difference).sum())


def fit_additive(
    weight: Tensor, hessian: Tensor, scheme: Scheme, *, rounds: int = 12, beam: int = 1, tolerance: float = 0.01, seed: int = 0
) -> tuple[Additives, list[float]]:
    """`weight [rows, columns]` as sums of codewords that fp16 holds, and the loss before the first and after every round.

    Ends after `rounds`, or where one gains less than the share `tolerance`. The loss never rises, but for the last rounding of
    codebooks and scales to fp16, after which the codes are searched once more.
    """
    generator = torch.Generator().manual_seed(seed)
    found = start_additive(weight, scheme, seed)
    losses = [found.loss(weight, hessian)]
    for _ in range(rounds):
        found = fit_scales(weight, hessian, fit_codebooks(weight, hessian, found))
        found = search_codes(weight, hessian, found, generator, beam)
        losses.append(found.loss(weight, hessian))
        if losses[-1] > losses[-2] * (1 - tolerance):
            break
    found = fit_scales(weight, hessian, fit_codebooks(weight, hessian, found))
    rounded = Additives(found.codes, found.codebooks.half().to(weight), found.scales.half().to(weight))
    return search_codes(weight, hessian, rounded, generator, beam), losses


def start_additive(weight: Tensor, scheme: Scheme, seed: int = 0) -> Additives:
    """Rows of norm one; each codebook is k-means of what those before it leave."""
    scales = weight.norm(dim=1, keepdim=True) + 1e-9
    rows, columns = weight.shape
    left = torch.nn.functional.pad(weight / scales, (0, -columns % scheme.unit)).view(-1, scheme.unit)
    codes, books = [], []
    for book in range(scheme.books):
        centroids, nearest = cluster_vectors(left, scheme.entries, seed=seed + book, iterations=30)
        left = left - centroids[nearest]
        codes.append(nearest.view(rows, -1))
        books.append(centroids)
    return Additives(torch.stack(codes, -1), torch.stack(books), scales)


def fit_scales(weight: Tensor, hessian: Tensor, found: Additives) -> Additives:
    """The best scale of every row for its codes and the codebooks."""
    plain = decode_additive(found.codes, found.codebooks, weight.shape[1])
    through = plain @ hessian
    own, shared = (plain * through).sum(1, keepdim=True), (weight * through).sum(1, keepdim=True)
    return Additives(found.codes, found.codebooks, torch.where(own > 0, shared / own.clamp(min=1e-30), found.scales))


def fit_codebooks(weight: Tensor, hessian: Tensor, found: Additives, steps: int = 16) -> Additives:
    """Codebooks of a lower loss for the codes and scales, by at most `steps` of conjugate gradients."""

    def through(difference: Tensor) -> Tensor:
        """Half of the gradient of tr(D H D^T) with regard to the codebooks."""
        return _gathered(found, (difference @ hessian) * found.scales)

    books = found.codebooks.clone()
    residual = -through(found.decode(weight.shape[1]) - weight)
    direction, energy = residual.clone(), residual.square().sum()
    for _ in range(steps):
        if float(energy) <= 1e-20:
            break
        step = decode_additive(found.codes, direction, weight.shape[1]) * found.scales
        curved = through(step)
        bend = (direction * curved).sum()
        if float(bend) <= 0:  # codewords that no code names, or that no input sees
            break
        length = energy / bend
        books, residual = books + length * direction, residual - length * curved
        last, energy = energy, residual.square().sum()
        direction = residual + energy / last * direction
    better = Additives(found.codes, books, found.scales)
    return better if better.loss(weight, hessian) <= found.loss(weight, hessian) else found


def _gathered(found: Additives, values: Tensor) -> Tensor:
    """Sums of `values [rows, columns]` over the places that name each codeword, the shape of the codebooks."""
    books, entries, unit = found.codebooks.shape
    vectors = torch.nn.functional.pad(values, (0, -values.shape[1] % unit)).view(-1, unit)
    sums = [values.new_zeros(entries, unit).index_add_(0, found.codes[:, :, book].flatten(), vectors) for book in range(books)]
    return torch.stack(sums)


def search_codes(weight: Tensor, hessian: Tensor, found: Additives, generator: torch.Generator, beam: int = 1) -> Additives:
    """One pass over all codes, groups and books in random order, all rows at once: the loss of no row rises.

    A row keeps its `beam` best sets of codes from one choice to the next; with 1 every choice is the best one given the others.
    """
    columns = weight.shape[1]
    books, _, unit = found.codebooks.shape
    groups = found.codes.shape[1]
    padding = groups * unit - columns
    hessian = torch.nn.functional.pad(hessian, (0, padding, 0, padding))
    difference = torch.nn.functional.pad(found.decode(columns) - weight, (0, padding))
    state = _Beam(found, difference @ hessian, ((difference @ hessian) * difference).sum(1))
    for group in torch.randperm(groups, generator=generator).tolist():
        for book in torch.randperm(books, generator=generator).tolist():
            state.choose(group, book, hessian, beam)
    return Additives(state.best(), found.codebooks, found.scales)


class _Beam:
    """Sets of codes of every row: `codes [kept, rows, groups, books]`, their D H `[kept, rows, columns]` and losses `[kept, rows]`."""

    def __init__(self, found: Additives, through: Tensor, losses: Tensor) -> None:
        self.codebooks, self.scales = found.codebooks, found.scales
        self.codes, self.through, self.losses = found.codes[None].clone(), through[None].clone(), losses[None]

    def choose(self, group: int, book: int, hessian: Tensor, beam: int) -> None:
        """Each row's best sets after all choices of one code in each of its sets."""
        words = self.codebooks[book]
        place = slice(group * words.shape[1], (group + 1) * words.shape[1])
        inside = hessian[place, place]
        old = words[self.codes[:, :, group, book]]  # [kept, rows, unit]
        # With d = s (c - old) the loss changes by 2 d (D H) + d H d.
        linear = 2 * (self.through[:, :, place] - self.scales * (old @ inside)) @ words.T * self.scales
        square = ((words @ inside) * words).sum(1) * self.scales.square()
        before = self._change(old, self.through[:, :, place], inside)
        losses = self.losses[:, :, None] + linear + square - before[:, :, None]
        if beam == 1:
            chosen = losses[0].argmin(1)
            origin = torch.zeros_like(chosen)[None]
            best, code = losses[0].gather(1, chosen[:, None]).T, chosen[None]
        else:
            best, origin, code = self._several(losses, group, book, beam)
        row = torch.arange(losses.shape[1])
        self.codes, self.through, old = self.codes[origin, row], self.through[origin, row], old[origin, row]
        moved = self.scales * (words[code] - old)
        self.through = self.through + moved @ hessian[place]
        self.codes[:, :, group, book] = code
        self.losses = best

    def _change(self, old: Tensor, through: Tensor, inside: Tensor) -> Tensor:
        """The part of the change that all choices share, so that the old code changes nothing, `[kept, rows]`."""
        linear = 2 * ((through - self.scales * (old @ inside)) * old * self.scales).sum(-1)
        return linear + ((old @ inside) * old).sum(-1) * self.scales[:, 0].square()

    def _several(self, losses: Tensor, group: int, book: int, beam: int) -> tuple[Tensor, Tensor, Tensor]:
        """The `beam` best different sets of each row: losses, which set each comes from, and the code, all `[beam, rows]`."""
        kept, rows, entries = losses.shape
        # Sets that differ in this code alone become the same ones: only the first of them may choose.
        others = self.codes.clone()
        others[:, :, group, book] = 0
        for one in range(1, kept):
            same = (others[:one] == others[one]).flatten(2).all(-1).any(0)
            losses[one, same] = torch.inf
        best = losses.transpose(0, 1).reshape(rows, -1).topk(min(beam, kept * entries), largest=False)
        origin, code = best.indices.T // entries, best.indices.T % entries
        return best.values.T, origin, code

    def best(self) -> Tensor:
        """The codes of each row's best set, `[rows, groups, books]`."""
        return self.codes[self.losses.argmin(0), torch.arange(self.codes.shape[1])]
