"""How far an encoder's sentence embeddings are from a reference's: their directions, and the order of their similarities."""

from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from fewbits.core.errors import InputError, NumericsError


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, sentences: Sequence[str], *, batch_size: int = 32, length: int = 128) -> Tensor:
    """float32 `[sentences, features]`: the mean of the token states, padding left out, at length one.

    Sentences are cut at `length` tokens. Raises NumericsError where an embedding is not finite.
    """
    found = []
    for start in range(0, len(sentences), batch_size):
        batch = list(sentences[start : start + batch_size])
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
        states = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][:, :, None].float()
        found.append(nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    embeddings = torch.cat(found)
    if not bool(embeddings.isfinite().all()):
        raise NumericsError("an embedding is not finite; one of the model's layers is broken")
    return embeddings


def compare_embeddings(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Both `[sentences, features]` at length one: cosines, rank correlation of all pairs' similarities, nearest neighbours.

    Raises InputError for fewer than three sentences or different numbers of them.
    """
    if len(ours) != len(theirs) or len(ours) < 3:
        raise InputError(f"{len(ours)} and {len(theirs)} embeddings cannot be compared; the same 3 or more sentences would be right")
    cosine = (ours * theirs).sum(-1).double()
    first, second = torch.triu_indices(len(ours), len(ours), offset=1)
    similarities = [(values @ values.T)[first, second].numpy() for values in (ours, theirs)]
    nearest = [(values @ values.T).fill_diagonal_(-2.0).argmax(-1) for values in (ours, theirs)]
    return {
        "sentences": len(ours),
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "rank_correlation": float(spearmanr(*similarities).statistic),
        "nearest_agreement": float((nearest[0] == nearest[1]).double().mean()),
    }
