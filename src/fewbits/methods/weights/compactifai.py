"""CompactifAI: every linear layer becomes a chain of small cores, and a short training heals what the truncation broke."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from fewbits.core.checks import check_group_size, check_positive, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import LayerMethod, Paper, Profile, Statistics, Tuning
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.dense import Dense
from fewbits.formats.permutation import Permutation
from fewbits.formats.ranges import fit_groups
from fewbits.formats.tensor_train import TensorTrain, matrix_of, near_equal_legs
from fewbits.formats.uniform import Uniform
from fewbits.layers.learned_tensor_train import RoundedTrain
from fewbits.layers.linear import StoredLinear
from fewbits.solvers.budget import choose
from fewbits.solvers.tensor_train import Train, bonds_for, decompose, largest_bond, parameters, tails

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # what a layer may get of its parameters under a profile; or all of them
Legs = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Compactifai(LayerMethod):
    """W, reshaped to output and input legs in pairs, is cut into `sites` cores by truncated SVD; all cores are then trained on text.

    The bond dimension is the largest whose cores hold at most `share` of the layer's parameters; with `discard` each layer
    takes as small bonds as discard that share of its squared weight instead. With a `profile` the loss is measured with single
    layers, blocks or types of layers cut to `share`, and `share` of all parameters is spread so that the rises foretold by the
    discarded weight are least in sum; a layer may stay whole. `legs` names factors of sizes ("256=16x16 768=24x32"), others are
    near-equal. `order="norm"` sorts rows and columns by their norms before they are cut; `start="random"` draws the cores, for
    comparison. Stored: cores in fp16, or with `core_bits` in groups of `group_size` with fp16 scales; 16 bits a row and column
    where they are sorted; trained norms. Departures: see the page. Raises InputError for values out of range.
    """

    share: float = 0.5
    sites: int = 2
    legs: str = ""
    discard: float | None = None
    profile: Literal["none", "layer", "block", "type"] = "none"
    profile_windows: int = 8
    order: Literal["identity", "norm"] = "identity"
    core_bits: int | None = None
    group_size: int = 64
    start: Literal["svd", "random"] = "svd"
    tune_steps: int = 300
    tune_rate: float = 1e-3
    norm_rate: float = 1e-3
    distill: bool = False  # KL(dense model || this model) in the place of the next token's loss
    batch_size: int = 4
    seed: int = 0

    paper: ClassVar[Paper] = Paper(
        "CompactifAI: Extreme Compression of Large Language Models using Quantum-Inspired Tensor Networks", "2401.14109", 2024
    )
    baseline: ClassVar[str | None] = "lord"
    needs: ClassVar = ()

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share={self.share} is out of range; above 0 and up to 1, such as 0.5, would be right")
        check_range("sites", self.sites, 2, 4)
        if self.discard is not None and not 0 <= self.discard < 1:
            raise InputError(f"discard={self.discard} is out of range; 0 or more and below 1, such as 0.3, would be right")
        if self.core_bits is not None:
            check_range("core_bits", self.core_bits, 2, 8)
        check_group_size(self.group_size)
        check_range("profile_windows", self.profile_windows, 1, 10**6)
        check_range("tune_steps", self.tune_steps, 0, 10**7)
        check_positive("tune_rate", self.tune_rate, 1e-3)
        check_range("norm_rate", self.norm_rate, 0, 1)
        check_positive("batch_size", self.batch_size, 4)
        for name, known in {
            "profile": ("none", "layer", "block", "type"),
            "start": ("svd", "random"),
            "order": ("identity", "norm"),
        }.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is not known; {', '.join(map(repr, known))} are")
        if self.discard is not None and (self.profile != "none" or self.start == "random"):
            raise InputError(
                f"discard={self.discard} fixes every layer's bonds by its weight; profile='none' and start='svd' would be right"
            )
        _parsed(self.legs, self.sites)

    def legs_of(self, rows: int, columns: int) -> Legs:
        """Output and input legs of a matrix: those named for its sizes, near-equal ones else."""
        named = _parsed(self.legs, self.sites)
        outputs, inputs = near_equal_legs(rows, columns, self.sites)
        return named.get(rows, outputs), named.get(columns, inputs)

    def profiling(self) -> Profile | None:
        return None if self.profile == "none" else Profile(self.profile, self.profile_windows)

    def trial(self, weight: Tensor) -> CompressedTensor:
        return self._stored(weight, self._bond(weight, self.share))

    def plan(self, layers: Iterator[tuple[str, Tensor, Statistics]]) -> Mapping[str, Tensor]:
        """Each layer's bond, int64 without axes, 0 where it stays whole; nothing without a profile.

        A layer's rise is taken to grow in proportion to the squared weight that its cuts discard.
        """
        if self.profile == "none":
            return {}
        names, rises, errors, sizes, bonds = [], [], [], [], []
        for name, weight, statistics in layers:
            weight = self._sorted(weight)[0]
            legs, mine = self.legs_of(*weight.shape), [self._bond(weight, share) for share in SHARES]
            trial, *lost = tails(weight, legs, [self._bond(weight, self.share), *mine])
            names.append(name)
            rises.append(float(statistics.sensitivity))
            errors.append([one / max(trial, 1e-30) for one in [*lost, 0.0]])
            sizes.append([float(min(parameters(legs, bond), weight.numel())) for bond in mine] + [float(weight.numel())])
            bonds.append([*mine, 0])
        least = max(1e-3 * max(rises, default=0.0), 1e-9)  # a rise that noise made negative is no gain
        costs = [[max(rise, least) * error for error in row] for rise, row in zip(rises, errors, strict=True)]
        chosen = choose(costs, sizes, self.share * sum(row[-1] for row in sizes))
        return {name: torch.tensor(row[index]) for name, row, index in zip(names, bonds, chosen, strict=True)}

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        bond = self._bond(weight, self.share) if statistics.choice is None else int(statistics.choice)
        return self._stored(weight, bond) if bond else CompressedTensor((Dense(weight.half()),))

    def tuning(self) -> Tuning | None:
        """The paper's healing."""
        if not self.tune_steps:
            return None
        return Tuning(
            self.tune_steps,
            self.tune_rate,
            tensors=("values",),
            batch_size=self.batch_size,
            clip=1.0,
            seed=self.seed,
            teacher=self.distill,
            norm_rate=self.norm_rate,
        )

    def reopen(self, stored: Any, bias: Tensor | None) -> nn.Module | None:
        is_train = isinstance(cast(StoredLinear, stored).weight.terms[0], TensorTrain)
        return RoundedTrain(stored, bias, self.tune_rate) if self.core_bits is not None and is_train else None

    def _bond(self, weight: Tensor, share: float) -> int:
        return largest_bond(self.legs_of(*weight.shape), share * weight.numel())

    def _stored(self, weight: Tensor, bond: int) -> CompressedTensor:
        legs = self.legs_of(*weight.shape)
        weight, inside, outside = self._sorted(weight)
        if self.start == "random":
            train = self._drawn(weight, legs, bond)
        elif self.discard is None:
            train = decompose(weight, legs, bond=bond, seed=self.seed)
        else:
            train = decompose(weight, legs, discard=self.discard)
        cores = tuple(self._core(matrix_of(core)) for core in train.cores)
        return CompressedTensor((TensorTrain(cores, *legs),), inside, outside)

    def _sorted(self, weight: Tensor) -> tuple[Tensor, tuple[Permutation, ...], tuple[Permutation, ...]]:
        """The matrix that is cut, and what its inputs and outputs then go through."""
        if self.order == "identity":
            return weight, (), ()
        rows, columns = (torch.argsort(weight.norm(dim=axis), stable=True) for axis in (1, 0))
        back = Permutation.from_order(torch.argsort(rows))
        return weight[rows][:, columns].contiguous(), (Permutation.from_order(columns),), (back,)

    def _drawn(self, weight: Tensor, legs: Legs, bond: int) -> Train:
        """Normal numbers of equal norms a core; what they multiply to has the weight's own norm, on average."""
        bonds, generator = bonds_for(legs, bond), torch.Generator().manual_seed(self.seed + weight.numel() + bond)
        shapes = [(bonds[i], bonds[i + 1], o, p) for i, (o, p) in enumerate(zip(*legs, strict=True))]
        # The product's variance is that of all cores' numbers times the number of paths through the bonds.
        paths = float(torch.tensor(bonds, dtype=torch.float64).prod())
        spread = (float(weight.double().square().mean()) / paths) ** (0.5 / len(shapes))
        return Train(tuple(spread * torch.randn(shape, generator=generator) for shape in shapes), ())

    def _core(self, matrix: Tensor) -> Term:
        if self.core_bits is None:
            return Dense(matrix.half())
        size = min(self.group_size, matrix.shape[1])
        scales, zeros = fit_groups(matrix, self.core_bits, size, search="mse")
        return Uniform.nearest(matrix, scales, zeros, bits=self.core_bits, group_size=size, symmetric=False)


def _parsed(text: str, sites: int) -> dict[int, tuple[int, ...]]:
    """Factors by the size that they multiply to, of "256=16x16 768=24x32". Raises InputError where that is not what it says."""
    found = {}
    for part in text.split():
        size, _, factors = part.partition("=")
        numbers = factors.split("x")
        if not (size.isdigit() and all(number.isdigit() for number in numbers)):
            raise InputError(f"legs={part!r} cannot be read; a size and its factors such as 768=24x32 would be right")
        legs = tuple(int(number) for number in numbers)
        if math.prod(legs) != int(size) or len(legs) != sites:
            raise InputError(f"legs={part!r} does not fit; {sites} factors whose product is {size} would be right")
        found[int(size)] = legs
    return found
