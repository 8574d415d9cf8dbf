"""What a compressed cache loses: a text is read as a generation would write it, token by token, with its own words forced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fewbits.core.errors import InputError, NumericsError
from fewbits.evaluation.fidelity import TokenScores, compare_logits
from fewbits.models.hf_cache import CompressedCache, cache_keyword


@torch.no_grad()
def score_cache(
    model: PreTrainedModel, windows: Tensor, opened: Callable[[], CompressedCache], *, prompt: int, batch_size: int = 8
) -> tuple[TokenScores, dict[str, Any]]:
    """Scores of the tokens after the first `prompt` ones of `windows [count, length]`, against the model without a cache.

    The prompt is read in one piece, and each later token in a step of its own, as `generate` does. Also returned: `memory` of
    the last batch's cache at its full length. Raises InputError where the prompt leaves no token to score, NumericsError where
    a loss is not finite.
    """
    if not 1 <= prompt < windows.shape[1] - 1:
        raise InputError(
            f"a prompt of {prompt} tokens leaves none of {windows.shape[1]} to score; 1 to {windows.shape[1] - 2} would be right"
        )
    found, memory = [], {}
    for batch in windows.split(batch_size):
        cache = opened()
        ours = torch.cat(list(_stepwise(model, batch, cache, prompt)), 1)
        theirs = cast(Any, model)(input_ids=batch, use_cache=False).logits[:, prompt:-1]
        found.append(compare_logits(ours, theirs, batch[:, prompt + 1 :]))
        memory = cache.memory()
    scores = TokenScores(*(torch.cat(list(column)) for column in zip(*found, strict=True)))
    if not bool(torch.isfinite(scores.loss).all()):
        raise NumericsError("the loss is not finite on some tokens; the cache, or the model, is broken")
    return scores, memory


def _stepwise(model: PreTrainedModel, batch: Tensor, cache: CompressedCache, prompt: int) -> Iterator[Tensor]:
    """Logits `[batch, 1, vocabulary]` after every token from the one behind the prompt on."""
    given = {cache_keyword(model): cache}
    mask = torch.ones_like(batch)
    cast(Any, model)(input_ids=batch[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True, **given)
    for place in range(prompt, batch.shape[1] - 1):
        step = batch[:, place : place + 1]
        yield cast(Any, model)(input_ids=step, attention_mask=mask[:, : place + 1], use_cache=True, **given).logits


def by_position(values: Tensor, first: int, edges: tuple[int, ...]) -> list[dict[str, float]]:
    """Means of `values [windows, tokens]`, whose first token lies at position `first`, between the positions `edges`.

    Each entry has `start`, `end` and `mean`; buckets without a token are left out.
    """
    buckets = []
    for start, end in pairwise(edges):
        inside = values[:, max(start - first, 0) : max(end - first, 0)]
        if inside.numel():
            buckets.append({"start": start, "end": end, "mean": float(inside.double().mean())})
    return buckets
