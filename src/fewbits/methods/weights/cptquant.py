"""CPTQuant: blocks are scored by correlation, by pruning or by perturbation, and three clusters of scores get three widths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.core.allocation_method import AllocationMethod, AllocationProblem, Order
from fewbits.core.checks import check_positive, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import Paper
from fewbits.pipeline.probe import ModelProbe
from fewbits.solvers.kmeans import cluster_rows, nearest_level
from fewbits.solvers.similarity import canonical_correlations, leading, linear_cka, pwcca, svcca

_SAMPLES_A_FEATURE = 10  # below that, canonical correlations say more of the sample than of the features
_COMPONENTS = 20
_KNOWN = {
    "measure": ("correlation", "pruning", "perturbation"),
    "similarity": ("cca", "pwcca", "svcca", "cka"),
    "form": ("difference", "first_order", "official"),
    "split": ("kmeans", "percentile"),
    "order": ("importance", "reverse", "random"),
}


@dataclass(frozen=True)
class Cptquant(AllocationMethod):
    """Each block's sensitivity, the scores in as many clusters as there are widths, the largest width for the highest cluster.

    "correlation" (CMPQ): one minus the mean similarity of the block's outputs, averaged over each text, to the other blocks'.
    "pruning" (PMPQ): the rise of perplexity where the smallest `prune_share` of each of the block's tensors is zero.
    "perturbation" (TDMPQ): the change of the loss where noise of `noise` standard deviations is added to its linear weights,
    mean over `draws` of the size; "first_order" takes it from gradients, "official" is the published code's: unit noise on the
    first tensor, and the loss itself. A budget below what the clusters ask for lowers blocks, the least sensitive first.
    "reverse" and "random" deal the same widths out otherwise, for comparison. Nothing is stored but what the base method stores.
    Departures: see the page. Raises InputError for values out of range.
    """

    measure: Literal["correlation", "pruning", "perturbation"] = "perturbation"
    similarity: Literal["cca", "pwcca", "svcca", "cka"] = "cca"
    prune_share: float = 0.3
    form: Literal["difference", "first_order", "official"] = "difference"
    noise: float = 0.05
    draws: int = 4
    split: Literal["kmeans", "percentile"] = "kmeans"
    order: Order = "importance"
    windows: int = 16  # "correlation" wants ten times as many as the directions that are to be compared
    seed: int = 0

    paper: ClassVar[Paper] = Paper(
        "CPTQuant - A Novel Mixed Precision Post-Training Quantization Techniques for Large Language Models", "2412.03599", 2024
    )
    baseline: ClassVar[str | None] = "rtn"
    bits: ClassVar[tuple[int, ...]] = (16, 8, 4)
    base: ClassVar[str] = "rtn:group_size=0"
    needs_budget: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("prune_share", self.prune_share, 0, 1)
        check_range("noise", self.noise, 0, 100)
        check_positive("draws", self.draws, 4)
        check_positive("windows", self.windows, 16)
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is not known; {', '.join(map(repr, known))} are")

    @torch.no_grad()
    def score(self, probe: ModelProbe) -> Mapping[str, float]:
        if self.measure == "correlation":
            return dict(
                zip(probe.blocks, self.correlations([probe.states(index + 1).mean(1) for index in range(len(probe.blocks))]), strict=True)
            )
        one = self._pruned if self.measure == "pruning" else self._perturbed
        return {name: one(probe, index) for index, name in enumerate(probe.blocks)}

    def correlations(self, features: Sequence[Tensor]) -> list[float]:
        """One minus the mean similarity to all others, for each block's `[texts, features]`. Raises InputError for too few texts."""
        if len(features[0]) < _SAMPLES_A_FEATURE:
            raise InputError(f"{len(features[0])} windows are too few to correlate; {_SAMPLES_A_FEATURE} or more would be right")
        alike = [[1.0 if one is two else self._similarity(one, two) for two in features] for one in features]
        return [1 - (sum(row) - 1) / max(len(row) - 1, 1) for row in alike]

    def allocate(self, problem: AllocationProblem, budget: float) -> dict[str, int]:
        scores, options = [problem.scores[part] for part in problem.sizes], problem.by_size()
        dealt = sorted((int(rank) for rank in self._ranks(torch.tensor(scores, dtype=torch.float64), len(options))), reverse=True)
        chosen = {part: options[rank] for part, rank in zip(problem.ordered(self.order, self.seed), dealt, strict=True)}
        for part in reversed(list(chosen)):
            # From the least sensitive block on, each down to the smallest width before the next one.
            while problem.size([chosen[one] for one in problem.sizes]) > budget and chosen[part] != options[0]:
                chosen[part] = options[options.index(chosen[part]) - 1]
        if (least := problem.size([chosen[one] for one in problem.sizes])) > budget:
            raise InputError(f"a budget of {budget:.6g} bits is too small; at least {least:.6g} would be right")
        return {part: chosen[part] for part in problem.sizes}

    def _similarity(self, one: Tensor, two: Tensor) -> float:
        if self.similarity == "cka":
            return linear_cka(one, two)
        # Fewer texts than ten a feature foretell anything: the leading directions alone are compared then.
        few = max(1, min(_COMPONENTS, len(one) // _SAMPLES_A_FEATURE))
        if self.similarity == "svcca":
            return svcca(one, two, few)
        if self.similarity == "pwcca":
            return pwcca(one, two, few)
        if len(one) < _SAMPLES_A_FEATURE * one.shape[1]:
            one, two = leading(one, few), leading(two, few)
        return float(canonical_correlations(one, two)[0])

    def _pruned(self, probe: ModelProbe, index: int) -> float:
        name = probe.blocks[index]
        values = {f"{name}.{one}": pruned(parameter, self.prune_share) for one, parameter in probe.block(name).named_parameters()}
        with probe.changed(values):
            return math.exp(float(probe.losses(index).mean())) - math.exp(float(probe.dense_losses.mean()))

    def _perturbed(self, probe: ModelProbe, index: int) -> float:
        generator = torch.Generator().manual_seed(self.seed)
        name = probe.blocks[index]
        if self.form == "official":
            first, parameter = next(iter(probe.block(name).named_parameters()))
            with probe.changed({f"{name}.{first}": parameter + torch.randn(parameter.shape, generator=generator)}):
                return float(probe.losses(index).mean())
        weights = {f"{layer}.weight": probe.parameter(f"{layer}.weight").data for layer in probe.linears[name]}
        slopes = gradients(probe, index, list(weights)) if self.form == "first_order" else {}
        sizes = []
        for _ in range(self.draws):
            steps = {
                one: self.noise * float(weight.std()) * torch.randn(weight.shape, generator=generator) for one, weight in weights.items()
            }
            if slopes:
                sizes.append(abs(sum(float((slopes[one].double() * step.double()).sum()) for one, step in steps.items())))
                continue
            with probe.changed({one: weights[one] + step for one, step in steps.items()}):
                sizes.append(abs(float((probe.losses(index) - probe.dense_losses).mean())))
        return sum(sizes) / len(sizes)

    def _ranks(self, scores: Tensor, count: int) -> Tensor:
        """For each score the number of its group, 0 the least sensitive."""
        if self.split == "percentile":
            return scores.argsort(stable=True).argsort() * count // len(scores)
        spread = (scores - scores.mean()) / scores.std(correction=0).clamp(min=1e-300)
        levels = cluster_rows(spread[None].float(), torch.ones(1, len(scores)), count)
        groups = ranked(scores, nearest_level(spread[None].float(), levels)[0].long())
        return groups + (count - 1 - int(groups.max()))  # where scores make fewer clusters, the smallest widths are not dealt out


def ranked(scores: Tensor, labels: Tensor) -> Tensor:
    """Labels of clusters, whatever they are, as ranks by the clusters' mean scores; 0 is the lowest."""
    means = {label: float(scores[labels == label].mean()) for label in labels.tolist()}
    order = sorted(means, key=means.__getitem__)
    return torch.tensor([order.index(label) for label in labels.tolist()])


def pruned(weight: Tensor, share: float) -> Tensor:
    """`weight` with the `share` of its entries that are smallest in size set to zero, rounded down."""
    flat = weight.detach().flatten().clone()
    flat[flat.abs().argsort(stable=True)[: int(share * flat.numel())]] = 0
    return flat.view_as(weight)


def gradients(probe: ModelProbe, index: int, names: Sequence[str]) -> dict[str, Tensor]:
    """Of the mean loss by parameters of block number `index`."""
    parameters = {name: probe.parameter(name) for name in names}
    try:
        with torch.enable_grad():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            for lost in probe.batch_losses(index):
                (lost.sum() / len(probe.windows)).backward()
        return {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in parameters.items()}
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
