"""How far a language model is from a reference: losses, KL divergence and agreement, token by token."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewbits.core.errors import InputError, NumericsError


@dataclass(frozen=True)
class TokenScores:
    """One value for every predicted token, `[windows, length - 1]`; the last three only against a reference."""

    loss: Tensor  # -log p(next token), nats
    reference_loss: Tensor | None = None
    forward_kl: Tensor | None = None  # KL(reference || model), nats
    reverse_kl: Tensor | None = None  # KL(model || reference), nats
    agreement: Tensor | None = None  # whether both put the same token first


@torch.no_grad()
def score(model: nn.Module, windows: Tensor, reference: nn.Module | None = None, *, batch_size: int = 4) -> TokenScores:
    """Run `windows [count, length]` through both models, keeping a few numbers a token and never all the logits.

    Raises InputError for windows of fewer than two tokens or models of different vocabularies, NumericsError where a loss
    is not finite.
    """
    if windows.ndim != 2 or windows.shape[1] < 2 or not len(windows):
        raise InputError(f"windows {list(windows.shape)} cannot be scored; [count, length of 2 or more] would be right")
    batches = list(_score_batches(model, windows, reference, batch_size))
    columns = [torch.cat([batch[key] for batch in batches]) for key in range(len(batches[0]))]
    if not bool(torch.isfinite(columns[0]).all()):
        raise NumericsError("the model's loss is not finite on some tokens; one of its layers is broken")
    return TokenScores(*columns)


def _score_batches(model: nn.Module, windows: Tensor, reference: nn.Module | None, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
    for batch in windows.split(batch_size):
        theirs = None if reference is None else _logits(reference, batch)
        yield compare_logits(_logits(model, batch), theirs, batch[:, 1:])


def _logits(model: Any, batch: Tensor) -> Tensor:
    """`[sequences, length - 1, vocabulary]`: what is said about the token after each but the last."""
    return cast(Tensor, model(input_ids=batch, use_cache=False).logits[:, :-1])


def compare_logits(ours: Tensor, theirs: Tensor | None, targets: Tensor) -> tuple[Tensor, ...]:
    """The columns of `TokenScores` from logits `[sequences, tokens, vocabulary]`, the loss alone where `theirs` is None.

    `targets [sequences, tokens]` are the next tokens. Raises InputError for different vocabularies.
    """
    ours, targets = torch.log_softmax(ours.float(), dim=-1), targets[..., None]
    loss = -ours.gather(-1, targets).squeeze(-1)
    if theirs is None:
        return (loss,)
    theirs = torch.log_softmax(theirs.float(), dim=-1)
    if theirs.shape != ours.shape:
        raise InputError(f"the models have vocabularies of {ours.shape[-1]} and {theirs.shape[-1]} tokens; they must be the same")
    forward = (theirs.exp() * (theirs - ours)).sum(-1)
    reverse = (ours.exp() * (ours - theirs)).sum(-1)
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).float()
    return loss, -theirs.gather(-1, targets).squeeze(-1), forward, reverse, agreement


def summarize(scores: TokenScores, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The numbers of the result record: perplexity with its standard error and, against a reference, KL and agreement."""
    loss, loss_error = mean_with_error(scores.loss)
    results: dict[str, Any] = {
        "tokens": scores.loss.numel(),
        "loss": loss,
        "loss_stderr": loss_error,
        "perplexity": math.exp(loss),
        "perplexity_stderr": math.exp(loss) * loss_error,  # delta method
    }
    if scores.reference_loss is None or scores.forward_kl is None or scores.reverse_kl is None or scores.agreement is None:
        return results
    for name, values in (("kl", scores.forward_kl), ("reverse_kl", scores.reverse_kl)):
        results |= {
            f"{name}_mean": float(values.double().mean()),
            f"{name}_median": float(values.double().median()),
            f"{name}_p99": float(torch.quantile(values.double().flatten(), 0.99)),
        }
    low, high = paired_interval(scores.loss, scores.reference_loss, resamples=resamples, seed=seed)
    difference = float((scores.loss.double() - scores.reference_loss.double()).mean())
    return results | {
        "top1_agreement": float(scores.agreement.mean()),
        "reference_perplexity": math.exp(float(scores.reference_loss.double().mean())),
        "delta_loss": difference,
        "delta_loss_interval": [low, high],
    }


def mean_with_error(values: Tensor) -> tuple[float, float]:
    """Mean of `values [windows, tokens]` and its standard error; windows are the independent units, their tokens are not."""
    means = values.double().mean(1)
    error = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else math.nan
    return float(means.mean()), error


def paired_interval(
    first: Tensor, second: Tensor, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of the mean of `first - second`, both `[windows, tokens]` of the same tokens.

    Bootstrap over windows: pairing removes what the text contributes, resampling whole windows respects that the tokens
    of one window depend on each other. Of runs that were repeated, `[repeats, windows, tokens]`, both repeats and windows are
    drawn, independently. Raises InputError where the shapes differ.
    """
    if first.shape != second.shape:
        raise InputError(f"a paired comparison needs the same tokens on both sides, not {list(first.shape)} and {list(second.shape)}")
    differences = (first.double() - second.double()).mean(-1)
    generator = torch.Generator().manual_seed(seed)
    windows = differences.shape[-1]
    drawn = torch.randint(windows, (resamples, windows), generator=generator)
    if differences.ndim == 1:
        means = differences[drawn].mean(1)
    else:
        repeats = torch.randint(len(differences), (resamples, len(differences)), generator=generator)
        means = differences[repeats].mean(1).gather(1, drawn).mean(1)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
