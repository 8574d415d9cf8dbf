"""Attention by the native kernel in the place of a model's own at the steps of a few tokens.

Dense keys and values are read where they are, packed ones as they lie: a cache of few bits gives the model stand-ins that have a shape
and no numbers. The attention function that is registered here knows them; whatever else is done with one has all of its numbers read
first, as if it had been there all along.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fewbits.core.cache_method import Side
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.coded import Coded
from fewbits.formats.transposed import Transposed
from fewbits.kernels.attention import Segment, attend, attend_dense, serves
from fewbits.kernels.dispatch import counts
from fewbits.kernels.layout import Description
from fewbits.models.attention_exchange import exchange_attention

FEW_TOKENS = 8  # new ones of a step, up to which packed keys and values are read as they lie
_PREFIX = "fewbits_packed_"
EXCHANGED = _PREFIX + "sdpa"  # the name under which it attends in the place of torch's own
_KNOWN = ("sdpa", "fewbits_probed_sdpa")  # whose mathematics this is
_UNKNOWN_OPTIONS = ("softcap", "position_bias", "s_aux")  # under which it would not be


class PackedStates(Tensor):
    """Keys or values `[batch, heads, tokens, width]` that lie packed: runs for each sequence, then `exact` tokens of all.

    Any operation of torch sees what `numbers()` gives.
    """

    side: Side
    runs: Sequence[Sequence[CompressedTensor]]
    exact: Tensor
    read: Callable[[], Tensor]

    @staticmethod
    def __new__(cls: type[Self], side: Side, runs: Sequence[Sequence[CompressedTensor]], exact: Tensor, read: Callable[[], Tensor]) -> Self:
        batch, heads, tokens, width = exact.shape
        shape = batch, heads, sum(run.shape[0] for run in runs[0]) + tokens, width
        made: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=exact.dtype, device=exact.device)  # type: ignore[attr-defined]
        made.side, made.runs, made.exact, made.read = side, runs, exact, read
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        arguments, keywords = tree_map(
            lambda one: one.numbers() if isinstance(one, PackedStates) else one, (arguments, dict(keywords or {}))
        )
        return function(*arguments, **keywords)

    def numbers(self) -> Tensor:
        """All of them, dense."""
        counts["attend_decoded"] += sum(len(runs) for runs in self.runs)
        return self.read()

    def segments(self) -> list[list[Segment]]:
        """What the kernel reads, for each sequence."""
        found = []
        for row, runs in enumerate(self.runs):
            own = [_segment(run, self.side, self.exact.shape[1]) for run in runs]
            exact = self.exact[row].transpose(0, 1)
            found.append([*own, Segment(len(exact), partial(_same, exact))])
        return found


def _same(states: Tensor) -> Tensor:
    return states


_DESCRIBED: weakref.WeakKeyDictionary[CompressedTensor, Description | None] = weakref.WeakKeyDictionary()  # runs are never changed


def _segment(run: CompressedTensor, side: Side, heads: int) -> Segment:
    if run in _DESCRIBED:
        matrix = _DESCRIBED[run]
    else:
        matrix = _DESCRIBED[run] = _describe(run, side)
    return Segment(run.shape[0], partial(_decoded, run, heads), matrix)


def _describe(run: CompressedTensor, side: Side) -> Description | None:
    """A run of one uniform term, keys by channels and values by tokens, as the kernel reads it; None for any other."""
    if len(run.terms) > 1 or run.input_transforms or run.output_transforms:
        return None
    term = run.terms[0]
    if side == "keys":
        if not isinstance(term, Transposed):
            return None
        term = term.inner
    matrix = term.described() if isinstance(term, Coded) else None
    return matrix if serves(matrix) else None


def _decoded(run: CompressedTensor, heads: int) -> Tensor:
    counts["attend_decoded"] += 1
    return run.decode().view(run.shape[0], heads, -1)


def attend_natively(model: PreTrainedModel) -> bool:
    """Have `model` attend by the kernel from now on where few tokens are new, and know packed keys and values.

    False where its own attention is not one whose place this can take.
    """
    name = model.config._attn_implementation
    if name.startswith(_PREFIX) or _PREFIX + "sdpa" in name:
        return True
    if name not in _KNOWN:
        return False
    original = ALL_ATTENTION_FUNCTIONS[name]

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        attended = None
        if key.shape == value.shape and _can_attend(module, query, key, attention_mask, options):
            scale = options.get("scaling")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            mask = None if attention_mask is None else attention_mask[:, 0]
            attended = _attend_as_they_lie(query, key, value, mask, scale)
        if attended is not None:
            return attended, None
        key, value = (states.numbers() if isinstance(states, PackedStates) else states for states in (key, value))
        return original(module, query, key, value, attention_mask, **options)

    exchange_attention(model, _PREFIX + name, attention)
    return True


def attend_by_itself(model: PreTrainedModel) -> None:
    """Undoes `attend_natively`."""
    name = model.config._attn_implementation
    if _PREFIX in name:
        model.set_attn_implementation(name.replace(_PREFIX, ""))


def _attend_as_they_lie(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
    """By the kernel, over packed keys and values, or the few queries' dense ones; None where torch had better have them dense."""
    if isinstance(key, PackedStates) and isinstance(value, PackedStates):
        keys, values = key.segments(), value.segments()
        packed = any(segment.matrix is not None for row in (*keys, *values) for segment in row)
        return attend(query, keys, values, mask, scale, heads=key.shape[1]) if packed else None
    dense = type(key) is type(value) is type(query) is Tensor and query.shape[2] <= FEW_TOKENS and not torch.compiler.is_compiling()
    return attend_dense(query, key, value, mask, scale) if dense else None


def _can_attend(module: Any, query: Tensor, key: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> bool:
    plain = all(options.get(name) is None for name in _UNKNOWN_OPTIONS) and not (options.get("dropout") and module.training)
    fits = query.shape[1] % key.shape[1] == 0 and query.shape[-1] == key.shape[-1]
    if mask is None:  # then torch would take what is causal from the other end of the tokens
        masked = query.shape[2] == 1
    else:
        masked = mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2:] == (query.shape[2], key.shape[2])
    return plain and fits and masked and not (torch.is_grad_enabled() and query.requires_grad)
