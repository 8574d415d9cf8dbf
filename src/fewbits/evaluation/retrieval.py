"""What a compressed cache still finds: needles are hidden in real text, and the model is asked for one of them behind it.

After the pass key test of Mohtashami and Jaggi (arXiv 2305.16300) and its kind with many keys (RULER, arXiv 2404.06654).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from fewbits.core.errors import InputError
from fewbits.models.hf_cache import CompressedCache, cache_keyword

_TEXT = """
alpha anchor basket bravo candle castle desert dragon eagle engine falcon forest garden guitar hammer harbor insect island jacket
jungle kernel kitten ladder lemon marble mirror needle novel ocean orange parrot pencil quartz queen river rocket shadow silver
ticket tunnel umbrella urban valley violet window winter yellow zebra
"""
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True)
class Form:
    """A needle's text is question, answer and rest, `times` times over; the question has a {key} and the answer a {value}."""

    question: str
    answer: str
    rest: str
    times: int = 1


FORMS = {
    "passkey": Form("\nThe pass key of {key} is", " {value}", ". Remember it.\n"),
    "function": Form("\ndef {key}(", "{value}", "):\n    pass\n", times=2),  # for models of Python
    "class": Form("\nclass {key}(", "{value}", "):\n    pass\n", times=2),
}


@dataclass(frozen=True)
class Questions:
    """`contexts [count, length]` with their needles, what is asked behind each, and the answer, in tokens."""

    contexts: Tensor
    asked: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]


def hide(
    tokenizer: PreTrainedTokenizerBase, windows: Tensor, form: str | Form, *, distance: int, needles: int = 1, seed: int = 0
) -> Questions:
    """One question for each of the texts `windows [count, length]`, which lose as many tokens at their end as needles take.

    `distance` tokens come between the end of the needle that is asked for and the question. Of the other needles half, rounded
    up, stand evenly spread in these, and the others before. Keys are two words and values one, all different in a context. A
    needle is tokenized piece by piece, so that the question is in it token by token. Raises InputError where needles do not fit.
    """
    if isinstance(form, str) and form not in FORMS:
        raise InputError(f"form {form!r} is not known; {', '.join(FORMS)} are")
    if needles < 1 or 3 * needles > len(WORDS):
        raise InputError(f"needles={needles} is out of range; 1 to {len(WORDS) // 3} would be right")
    shape = FORMS[form] if isinstance(form, str) else form
    drawn, contexts, asked, answers = random.Random(seed), [], [], []
    for window in windows.tolist():
        words = iter(drawn.sample(WORDS, 3 * needles))
        pieces = [_pieces(tokenizer, shape, f"{next(words)}_{next(words)}", next(words)) for _ in range(needles)]
        question, answer, _ = pieces[0]
        hidden, *strewn = [list(sum(one, ())) * shape.times for one in pieces]
        behind, before = strewn[: needles // 2], strewn[needles // 2 :]
        text = len(window) - len(hidden) - sum(map(len, strewn))
        last = distance - sum(map(len, behind))
        if last < 0 or text < last:
            most = len(window) - len(hidden) - sum(map(len, before))
            raise InputError(f"distance={distance} is out of range; {sum(map(len, behind))} to {most} would be right for these needles")
        contexts.append([*_strewn(window[: text - last], before), *hidden, *_strewn(window[text - last : text], behind)])
        asked.append(question)
        answers.append(answer)
    return Questions(torch.tensor(contexts), tuple(asked), tuple(answers))


def _pieces(tokenizer: PreTrainedTokenizerBase, form: Form, key: str, value: str) -> tuple[tuple[int, ...], ...]:
    texts = form.question.format(key=key), form.answer.format(value=value), form.rest
    return tuple(tuple(cast(Any, tokenizer).encode(text, add_special_tokens=False)) for text in texts)


def _strewn(text: Sequence[int], needles: Sequence[Sequence[int]]) -> list[int]:
    """`text` with the needles in it, and equally much of it before, between and behind them."""
    edges = [len(text) * place // (len(needles) + 1) for place in range(len(needles) + 2)]
    found = list(text[: edges[1]])
    for needle, start, end in zip(needles, edges[1:], edges[2:], strict=False):
        found += [*needle, *text[start:end]]
    return found


@torch.no_grad()
def retrieve(
    model: PreTrainedModel, questions: Questions, opened: Callable[[], Cache], *, batch_size: int = 16
) -> tuple[Tensor, dict[str, Any]]:
    """Which answers the model gives token for token where it always takes the likeliest, bool `[count]`, and the last cache's `memory`.

    A context is read, all of it that is due is sealed, and the question is read behind it. It is read with its answer in one
    step: where each token of it is the likeliest after those before, a model that writes them one by one writes these. So
    question and answer see each other exactly, as behind a method's few exact tokens.
    """
    found, cache = [], opened()
    for start in range(0, len(questions.asked), batch_size):
        cache = opened()
        given = {cache_keyword(model): cache}
        chosen = slice(start, start + batch_size)
        pairs = list(zip(questions.asked[chosen], questions.answers[chosen], strict=True))
        cast(Any, model)(input_ids=questions.contexts[chosen], use_cache=True, **given)
        if isinstance(cache, CompressedCache):
            cache.flush()
        length = max(len(question) + len(answer) for question, answer in pairs)
        rows = [[*question, *answer, *[0] * (length - len(question) - len(answer))] for question, answer in pairs]  # nobody sees the zeros
        likeliest = cast(Any, model)(input_ids=torch.tensor(rows), use_cache=True, **given).logits.argmax(-1).tolist()
        for row, (question, answer) in zip(likeliest, pairs, strict=True):
            found.append(tuple(row[len(question) - 1 : len(question) + len(answer) - 1]) == answer)
    return torch.tensor(found), cache.memory() if isinstance(cache, CompressedCache) else {}


def share(hits: Tensor) -> tuple[float, float, float]:
    """Of `hits [count]`, bool, the share that is true and the ends of Wilson's 95 % interval."""
    count, part, z = len(hits), float(hits.double().mean()), 1.959964
    middle = (part + z * z / (2 * count)) / (1 + z * z / count)
    reach = z * math.sqrt(part * (1 - part) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return part, max(middle - reach, 0.0), min(middle + reach, 1.0)
