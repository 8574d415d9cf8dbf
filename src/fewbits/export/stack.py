"""The stack of a checkpoint whose layers' terms are ranked: what of it fits in a number of bytes.

Source: BitStack (arXiv 2410.23918), section 3.3.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fewbits.core.errors import InputError

_TERM = re.compile(r"(.+)\.weight__terms__(\d+)__.+")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Stack:
    """`order`: a layer's n-th mention is that of its term n + 1; `sizes[i]`: bytes of the model with the first i of them.

    A size counts every stored tensor: first terms, scales, and the dense parameters in the dtypes of the file.
    """

    order: tuple[str, ...]
    sizes: tuple[int, ...]

    def length(self, memory: int) -> int:
        """How many mentions fit in `memory` bytes. Raises InputError where not even the first terms do."""
        if memory < self.sizes[0]:
            raise InputError(f"memory of {memory} bytes is too little; the smallest size of this model is {self.sizes[0]} bytes")
        return bisect_right(self.sizes, memory) - 1

    def counts(self, memory: int) -> dict[str, int]:
        """The number of terms within `memory` bytes, of every layer that has more than one."""
        chosen = Counter(self.order[: self.length(memory)])
        return {layer: 1 + chosen[layer] for layer in dict.fromkeys(self.order)}


def describe_stack(order: Sequence[str], sizes: Mapping[str, int]) -> dict[str, Any]:
    """What config.json holds of a stack; `sizes` are the bytes of every tensor by its name in the file."""
    terms: Counter[tuple[str, int]] = Counter()
    for name, size in sizes.items():
        if found := _TERM.fullmatch(name):
            terms[found[1], int(found[2])] += size
    seen: Counter[str] = Counter()
    steps = []
    for layer in order:
        seen[layer] += 1
        steps.append(terms[layer, seen[layer]])
    return {"order": list(order), "bytes": list(accumulate(steps, initial=sum(sizes.values()) - sum(steps)))}


def shortened(settings: Mapping[str, Any], count: int | None) -> dict[str, Any]:
    """A layer's settings with its first `count` terms alone; None: all of them."""
    weight = settings["weight"]
    return {**settings, "weight": {**weight, "terms": {"parts": weight["terms"]["parts"][:count]}}}


def memory_in_bytes(memory: int | str) -> int:
    """Bytes, as a number or as text: 120000000, "120MB" (decimal) or "114.5 MiB" (binary). Raises InputError for anything else."""
    found = _SIZE.fullmatch(str(memory))
    if found is None or isinstance(memory, bool):
        raise InputError(f"memory={memory!r} is not a size; bytes, or text such as '120MB' or '114MiB', would be right")
    power = " KMGT".index((found[2] or " ").upper())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)
