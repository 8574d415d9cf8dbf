"""The role of a method that writes keys and values in few bits, and what it is told of the tokens it writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.method import Method
from fewbits.core.tensor import CompressedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Side = Literal["keys", "values"]
Report = Callable[[int, int, str], None]  # how much of how much is done, and what it was


def silent(done: int, total: int, what: str) -> None:
    """The report of a calibration that nobody watches."""


@dataclass(frozen=True)
class CacheRun:
    """Neighbouring tokens of one sequence that are sealed together in one layer.

    Channels are `heads * head_dim`, head after head. `salience [heads, tokens]` says how much the tokens were attended to,
    where the method asks for it; `tables` are the layer's calibrated tensors; `settled` is what the layer keeps of the sequence
    since its first run: an empty mapping at the first one, then what the method's `settle` said of it.
    """

    layer: int
    start: int  # tokens of the sequence before these
    prompt: bool  # whether they belong to the prompt
    heads: int
    salience: Tensor | None = None
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    settled: Mapping[str, Tensor] = field(default_factory=dict)
    padding: int = 0  # tokens at the sequence's left that are no text


class CacheMethod(Method, ABC):
    """Seals runs of tokens, layer by layer and sequence by sequence; what is sealed is never touched again.

    A cache keeps new tokens exact until the method calls them `due`; a token is exact in the step that brings it.
    """

    rotated_keys: ClassVar[bool] = True  # False: keys are sealed as they were before their rotary embedding
    uses_salience: ClassVar[bool] = False  # whether `CacheRun.salience` is to be measured
    uses_inputs: ClassVar[bool] = False  # True: sealed is what `latent` makes of the projections' inputs; keys are not rotated then
    probe_share: float = 0.1  # of the queries, which salience is measured with
    calibrated: ClassVar[bool] = False  # whether it reads tables that `calibrate` makes for one model beforehand
    uncalibrated_fields: ClassVar[frozenset[str]] = frozenset()  # those that its tables do not depend on

    @abstractmethod
    def due(self, waiting: int, side: Side, prompt: bool) -> int:
        """How many of the `waiting` exact tokens, the oldest first, are to be sealed now; 0: none."""

    @abstractmethod
    def seal_keys(self, keys: Tensor, run: CacheRun) -> CompressedTensor:
        """`keys [tokens, channels]`, float32, of one sequence."""

    @abstractmethod
    def seal_values(self, values: Tensor, run: CacheRun) -> CompressedTensor:
        """`values [tokens, channels]`, float32, of one sequence."""

    def settle(self, keys: Tensor, values: Tensor, run: CacheRun) -> Mapping[str, Tensor]:
        """What a sequence's first run decides for all later ones, such as which channels get more bits; counted as stored."""
        return {}

    def latent(self, inputs: Tensor, side: Side, tables: Mapping[str, Tensor]) -> Tensor:
        """Of a projection's `inputs [batch, tokens, features]`, `[batch, tokens, width]`; the width is a multiple of the heads."""
        raise NotImplementedError(f"{self.name()} says that it uses inputs, but not how")

    def restore(self, latents: Tensor, side: Side, tables: Mapping[str, Tensor]) -> Tensor:
        """Sealed latents, read back, to what the projection makes but for its bias: `[batch, tokens, channels]`."""
        raise NotImplementedError(f"{self.name()} says that it uses inputs, but not how")

    def calibrate(self, model: PreTrainedModel, windows: Tensor, report: Report = silent) -> dict[int, dict[str, Tensor]]:
        """Its tables by layer, from a text's tokens `windows [count, length]`. Raises InputError for a method that has none."""
        raise InputError(f"{self.name()} reads no tables, so there is nothing to calibrate; it can be used as it is")
