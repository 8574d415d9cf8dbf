"""What an option loses in one layer, by four measures: of the layer's outputs, of the loss's gradients, or of the whole model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.method import GradientMethod
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.models.adapter import oriented
from fewbits.models.source import ModelSource
from fewbits.pipeline.gradients import gather_output_gradients, gather_sensitivities
from fewbits.pipeline.probe import ModelProbe
from fewbits.pipeline.store import Store

Kind = Literal["kl", "hessian", "fisher", "output"]


@dataclass(frozen=True)
class Candidate:
    """One option in one layer: its dense `weight [out, in]`, what is `stored` of it, and what is known of its inputs."""

    layer: str
    weight: Tensor
    stored: StoredLinear
    moment: Tensor  # 2 E[x x^T], `[in, in]`
    relative_error: float  # squared output error over squared output
    known: Tensor | None = None  # what the sensitivity keeps of the layer


class Sensitivity(ABC):
    """Prepared once for a model and its text, then asked about every candidate, here or in a process that it is sent to."""

    kind: ClassVar[Kind]

    def __init__(self, source: ModelSource, layers: Sequence[str], windows: Tensor, mask: Tensor | None, store: Store) -> None:
        """`windows [count, length]` are those that it is measured on; what takes long is kept in `store`."""
        self.store = store

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "store"}  # whose files stay here

    def known(self, layers: Collection[str]) -> Mapping[str, Tensor]:
        """What is kept of `layers`, for their candidates; nothing by default."""
        return {}

    @abstractmethod
    def loss(self, candidate: Candidate) -> float: ...


class OutputError(Sensitivity):
    """Squared error of the layer's outputs over their square: nothing is known of what the model makes of them."""

    kind = "output"

    def loss(self, candidate: Candidate) -> float:
        return candidate.relative_error


class _SquaredGradients(GradientMethod):
    uses_gradients = True

    def sensitivity(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient.square()


class _GradientLoss(Sensitivity):
    """Half a quadratic form of the error, whose matrix is an estimate of the Fisher information from single samples' gradients."""

    def __init__(self, source: ModelSource, layers: Sequence[str], windows: Tensor, mask: Tensor | None, store: Store) -> None:
        if mask is not None and not bool(mask.all()):
            raise InputError(f"{self.kind} reads whole windows; documents of their own with padding are not taken: leave --separate out")
        super().__init__(source, layers, windows, mask, store)
        if not store.has_state(self.kind):
            store.write_state(self.kind, self._gather(source, layers, windows))

    @abstractmethod
    def _gather(self, source: ModelSource, layers: Sequence[str], windows: Tensor) -> Mapping[str, Tensor]: ...

    def known(self, layers: Collection[str]) -> Mapping[str, Tensor]:
        return self.store.state(self.kind, layers)

    def loss(self, candidate: Candidate) -> float:
        assert candidate.known is not None
        return self._loss(candidate, candidate.known)

    @abstractmethod
    def _loss(self, candidate: Candidate, kept: Tensor) -> float: ...


class Fisher(_GradientLoss):
    """1/2 sum F * error**2 in nats a token, F the diagonal of the Fisher information: errors of two weights are taken as unrelated."""

    kind = "fisher"

    def _gather(self, source: ModelSource, layers: Sequence[str], windows: Tensor) -> Mapping[str, Tensor]:
        with torch.enable_grad():
            sums = gather_sensitivities(source, dict.fromkeys(layers, _SquaredGradients()), windows)
        # A sample's loss is the mean of its tokens', whose gradients are nearly unrelated: a token's squares are as many times larger.
        return {name: total * ((windows.shape[1] - 1) / len(windows)) for name, total in sums.items()}

    def _loss(self, candidate: Candidate, kept: Tensor) -> float:
        error = candidate.stored.weight.decode() - candidate.weight
        return float((kept * error.square()).sum(dtype=error.dtype)) / 2


class OutputHessian(_GradientLoss):
    """1/2 sum over outputs of E[g**2] times the output's mean squared error, in nats a token; g is the loss's gradient by it.

    The Hessian of each row of weights is taken to be E[g**2] E[x x^T], that of different rows to be unrelated.
    """

    kind = "hessian"

    def _gather(self, source: ModelSource, layers: Sequence[str], windows: Tensor) -> Mapping[str, Tensor]:
        return gather_output_gradients(source, layers, windows)

    def _loss(self, candidate: Candidate, kept: Tensor) -> float:
        error = candidate.stored.weight.decode() - candidate.weight
        squares = ((error @ candidate.moment) * error).sum(1) / 2
        return float((kept * squares).sum()) / 2


class Divergence(Sensitivity):
    """KL(dense model || the model with this one layer replaced), nats a token: measured, not estimated."""

    kind = "kl"

    def __init__(self, source: ModelSource, layers: Sequence[str], windows: Tensor, mask: Tensor | None, store: Store) -> None:
        super().__init__(source, layers, windows, mask, store)
        self.probe = ModelProbe(source, windows, mask)

    def loss(self, candidate: Candidate) -> float:
        layer, stored, first = candidate.layer, candidate.stored, self.probe.block_of(candidate.layer)
        linear = self.probe.linears[self.probe.blocks[first]][layer]
        if stored.activation is None and stored.offset is None:
            with self.probe.changed({f"{layer}.weight": oriented(linear, stored.weight.decode())}):
                return self.probe.divergence(first)
        bias = linear.bias
        with self.probe.replaced(layer, CompressedLinear(stored, bias if isinstance(bias, Tensor) else None)):
            return self.probe.divergence(first)


SENSITIVITIES: dict[str, type[Sensitivity]] = {one.kind: one for one in (Divergence, OutputHessian, Fisher, OutputError)}
