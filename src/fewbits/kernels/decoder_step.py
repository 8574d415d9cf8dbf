"""A decoder layer's computing for a few tokens in two native calls, before its attention and after; `csrc/decoder_step.h` says what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.kernels import native
from fewbits.kernels.dispatch import counts
from fewbits.kernels.layout import Description


@dataclass(frozen=True)
class Heads:
    """How many ask, how many keys and values there are for them, and how many channels each has."""

    queries: int
    keys: int
    width: int


@dataclass(frozen=True)
class Way:
    """How kernels are to compute: with which instructions, of how many digits of inputs, on how many threads."""

    isa: str
    digits: int
    threads: int

    @classmethod
    def chosen(cls, dtype: torch.dtype) -> Way | None:
        """What is asked for now, for numbers of this dtype; None where no kernel was built, or none is wanted."""
        isa = None if native.extension() is None else native.chosen()
        return None if isa is None else cls(isa, native.digits(dtype), torch.get_num_threads())


class DecoderStep:
    """What is read once: sums of queries, keys, values, output, gate, up and down, and the weights of the norms before attention and
    MLP, and of each head's queries and keys where these have some.

    States, norms and outputs are of one dtype. Tensors are read where they are for as long as the step is used, and are kept alive.
    Raises ValueError where sizes do not fit.
    """

    def __init__(self, heads: Heads, sums: Sequence[Description], norms: Sequence[Tensor], epsilons: Sequence[float]) -> None:
        extension, number = native.extension(), native.number(norms[0].dtype)
        assert extension is not None and number is not None
        self.heads, self.dtype, self.hidden = heads, norms[0].dtype, norms[0].numel()
        self.tensors = (*(tensor for one in sums for tensor in one.tensors), *norms)
        layout = [number, heads.queries, heads.keys, heads.width, int(len(norms) > 2), *(size for one in sums for size in one.layout)]
        self.native = extension.DecoderStep(layout, native.buffers(self.tensors), list(epsilons))

    def before(self, way: Way, states: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[batch, heads, tokens, width]` of `states [batch, tokens, hidden]`, turned by angles of each token
        `[batch or 1, tokens, width]`. All are contiguous and of the step's dtype.
        """
        counts["decoder_step"] += 1
        batch, tokens, _ = states.shape
        found = [torch.empty(self._shape(batch, tokens, count), dtype=self.dtype) for count in (self.heads.queries, *[self.heads.keys] * 2)]
        positions = cosine.numel() // self.heads.width
        held = native.buffers((states, cosine, sine, *found))
        self.native.before(way.isa, held, batch * tokens, positions, way.threads, way.digits)
        queries, keys, values = found if tokens == 1 else (one.transpose(1, 2) for one in found)
        return queries, keys, values

    def after(self, way: Way, attended: Tensor, states: Tensor) -> Tensor:
        """The layer's output, of what attention gave `[batch, tokens, heads, width]` and its own input; all contiguous, of one dtype."""
        outputs = torch.empty(states.shape, dtype=self.dtype)
        tokens = states.shape[0] * states.shape[1]
        self.native.after(way.isa, native.buffers((attended, states, outputs)), tokens, way.threads, way.digits)
        return outputs

    def _shape(self, batch: int, tokens: int, heads: int) -> tuple[int, int, int, int]:
        width = self.heads.width
        return (batch, heads, 1, width) if tokens == 1 else (batch, tokens, heads, width)
