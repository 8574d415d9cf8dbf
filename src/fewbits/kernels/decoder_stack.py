"""All decoder layers of a model for one new token in one native call, their attention included; `csrc/decoder_stack.h` says what."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbits.kernels import native
from fewbits.kernels.decoder_step import DecoderStep, Way
from fewbits.kernels.dispatch import counts


class DecoderStack:
    """Layers' steps one behind another, and the weight of the norm behind them, which is read where it is and kept alive.

    Raises ValueError where sizes do not fit.
    """

    def __init__(self, steps: Sequence[DecoderStep], norm: Tensor, epsilon: float, scale: float) -> None:
        extension = native.extension()
        assert extension is not None
        self.steps, self.norm = tuple(steps), norm
        self.heads, self.dtype, self.hidden = steps[0].heads, steps[0].dtype, steps[0].hidden
        self.native = extension.DecoderStack([step.native for step in steps], native.buffers((norm,)), epsilon, scale)

    def run(self, way: Way, states: Tensor, angles: tuple[Tensor, Tensor], kept: Sequence[int], before: int) -> Tensor | None:
        """The normalized states `[1, 1, hidden]` of a token with those before its first layer, turned by cosines and sines `[width]`.

        `kept` are addresses and sizes of each layer's keys and values `[key heads, room, width]`, of which so many tokens are filled
        `before`; the new token's are written behind these. All are contiguous and of the steps' dtype. None, and nothing is computed,
        while another thread is in the same stack.
        """
        outputs = torch.empty(states.shape, dtype=self.dtype)
        held = native.buffers((states, *angles, outputs))
        if not self.native.run(way.isa, held, kept, before, way.threads, way.digits):
            return None
        counts["decoder_stack"] += 1
        return outputs
