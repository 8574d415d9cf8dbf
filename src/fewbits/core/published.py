"""What a paper reports of its method, so that it can be measured again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WIKITEXT = "Salesforce/wikitext/wikitext-2-raw-v1:test"  # WikiText2's test part, as load_text names it
LLAMA2_AT_4K: Mapping[str, Any] = {"model": "meta-llama/Llama-2-7b-hf", "length": 4096, "dense": 5.12}


@dataclass(frozen=True)
class Figure:
    """One perplexity of a paper's table. `spec` is our "METHOD:field=value,..." for it, None where nothing here is that method."""

    label: str
    perplexity: float
    bits: float | None = None  # a weight, as the paper counts them
    spec: str | None = None


@dataclass(frozen=True)
class Published:
    """Perplexities of one model on one text: the method's own, and those that the paper holds against it, the strongest first.

    `model` is its name on the Hugging Face hub, `text` and `length` the text and the tokens of a window, `dense` the perplexity of the
    uncompressed model, `calibration` what the paper's method was calibrated on, in words, `source` where the figures stand, `setting` what
    our specs cannot say of the paper's.
    """

    own: Figure
    rivals: tuple[Figure, ...]
    dense: float = 5.68
    model: str = "huggyllama/llama-7b"
    text: str = WIKITEXT
    length: int = 2048
    calibration: str = "128 windows of 2048 tokens of C4"
    source: str = "the paper"
    setting: str = ""

    @property
    def rival(self) -> Figure:
        """The strongest one that is a method here."""
        return next(one for one in self.rivals if one.spec is not None)

    @property
    def specs(self) -> list[str]:
        """Of all that are methods here, the rival first: what others are held against."""
        figures = [self.rival, self.own, *(one for one in self.rivals if one is not self.rival)]
        return [one.spec for one in figures if one.spec is not None]


def share_removed(dense: float, rival: float, own: float) -> float | None:
    """Of the loss that the rival adds to the dense model's, in nats, the share that the method does not; None where it adds none."""
    rise = math.log(rival / dense)
    return 1 - math.log(own / dense) / rise if rise > 0 else None
