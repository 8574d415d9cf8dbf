"""What models write on from the same prompts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fewbits.core.errors import InputError


@dataclass(frozen=True)
class Samples:
    """Prompts, and how many tokens each is written on by, the likeliest one each time; 0: nothing is written."""

    prompts: tuple[str, ...] = ("def read_lines(path):", "class Counter(dict):")
    tokens: int = 32

    def __post_init__(self) -> None:
        if self.tokens < 0 or (self.tokens and not all(self.prompts)):
            raise InputError(
                f"{self.tokens} tokens after {list(self.prompts)}: 0 or more, after prompts that are not empty, would be right"
            )


def write_on(model: nn.Module | None, tokenizer: Any, samples: Samples) -> tuple[list[str], float | None]:
    """What `model` writes after each prompt, and tokens a second over all of them; nothing, and None, without a model."""
    if model is None:
        return [], None
    written, count, began = [], 0, time.monotonic()
    for prompt in samples.prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        end = tokenizer.eos_token_id
        with torch.no_grad():
            tokens = cast(Any, model).generate(**inputs, max_new_tokens=samples.tokens, do_sample=False, pad_token_id=end)[0]
        fresh = tokens[inputs["input_ids"].shape[1] :]
        count += len(fresh)
        written.append(str(tokenizer.decode(fresh, skip_special_tokens=True)))
    return written, count / max(time.monotonic() - began, 1e-9)
