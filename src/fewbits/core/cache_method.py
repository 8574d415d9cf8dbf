"""The role of a method that writes keys and values in few bits, and what it is told of the tokens it writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from fewbits.core.method import Method
from fewbits.core.tensor import CompressedTensor

Side = Literal["keys", "values"]


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


class CacheMethod(Method, ABC):
    """Seals runs of tokens, layer by layer and sequence by sequence; what is sealed is never touched again.

    A cache keeps new tokens exact until the method calls them `due`; a token is exact in the step that brings it.
    """

    rotated_keys: ClassVar[bool] = True  # False: keys are sealed as they were before their rotary embedding
    uses_salience: ClassVar[bool] = False  # whether `CacheRun.salience` is to be measured
    probe_share: float = 0.1  # of the queries, which salience is measured with
    calibrated: ClassVar[bool] = False  # whether it reads tables that are made for one model beforehand

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
