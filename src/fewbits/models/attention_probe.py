"""How much each cached token is attended to, read beside a model's own attention from a few probe queries.

Source: ZipCache (arXiv 2405.14256), sections 4.2 and 4.3: normalized attention scores, probe tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fewbits.core.errors import InputError
from fewbits.models.attention_exchange import exchange_attention

_PREFIX = "fewbits_probed_"


class Probed(Protocol):
    """A cache layer that wants to know."""

    probe_share: float
    returned: Callable[[], Tensor | None]  # the keys that it gave to the attention last

    def attended(self, sums: Tensor, counts: Tensor) -> None:
        """Attention summed over the probe queries, `sums [batch, heads, tokens]`, and how many of them see each token `[batch, tokens]`."""


_LAYERS: weakref.WeakSet[Any] = weakref.WeakSet()


def watch_attention(model: PreTrainedModel, layers: list[Any]) -> None:
    """From now on `layers` are told what `model`'s attention does with the keys that they returned.

    Raises InputError where the model's attention cannot be exchanged.
    """
    _LAYERS.update(layers)
    name = model.config._attn_implementation
    if _PREFIX in name:  # under another of this library's, it may be
        return
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise InputError(f"the attention {name!r} cannot be watched; a model loaded with attn_implementation='sdpa' would be right")
    original = ALL_ATTENTION_FUNCTIONS[name]

    def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        layer = next((one for one in _LAYERS if one.returned() is key), None)
        if layer is not None:
            scaling = options.get("scaling")
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            layer.attended(*column_scores(query, key, attention_mask, scale, layer.probe_share))
        return original(module, query, key, value, attention_mask, **options)

    exchange_attention(model, _PREFIX + name, watched)


@torch.no_grad()
def column_scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, share: float) -> tuple[Tensor, Tensor]:
    """Attention to each of the `tokens`, summed over the probe rows and over the queries of a key's head, and who sees it.

    `query [batch, heads, rows, width]`, `key [batch, key heads, tokens, width]`, `mask` bool or added to the logits, or None
    for a causal one. Probe rows are the last half of `share` and as many drawn from the others, all rows where there are few.
    Returns `[batch, key heads, tokens]` and the probe rows that see a token, `[batch, tokens]`.
    """
    rows = probe_rows(query.shape[2], share)
    tokens, groups = key.shape[2], query.shape[1] // key.shape[1]
    seen = _visible(mask, rows, query.shape[2], tokens)  # [batch or 1, rows, tokens]
    chosen = query[:, :, rows].float().unflatten(1, (key.shape[1], groups))
    logits = chosen @ key.float()[:, :, None].transpose(-1, -2) * scale
    logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
    # A row of padding sees nothing: it has no attention to give.
    attention = torch.softmax(logits, -1).nan_to_num(0.0)
    return attention.sum((2, 3)), seen.sum(1).expand(len(query), -1)


def probe_rows(count: int, share: float) -> Tensor:
    """int64, ascending: of `count` rows the last half of `share`, and as many drawn from those before, by a fixed seed."""
    half = max(1, round(count * share / 2))
    if 2 * half >= count:
        return torch.arange(count)
    drawn = torch.randperm(count - half, generator=torch.Generator().manual_seed(count))[:half]
    return torch.cat([drawn.sort().values, torch.arange(count - half, count)])


def _visible(mask: Tensor | None, rows: Tensor, queries: int, tokens: int) -> Tensor:
    if mask is None:
        return (torch.arange(tokens) <= rows[:, None] + tokens - queries)[None]
    chosen = mask[:, 0, rows, :tokens]
    # Where a row is padding some masks let it see everything at one value.
    return chosen if chosen.dtype == torch.bool else chosen > torch.finfo(chosen.dtype).min / 2
