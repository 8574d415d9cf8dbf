"""A tokenizer as GGUF files hold it: tokens, merges, and the name by which llama.cpp knows how text is cut before merging."""

from __future__ import annotations

import json
from typing import Any

from fewbits.core.errors import InputError
from fewbits.models.gguf.vocabulary import CONTROL, CUTS, NORMAL, SPECIAL, UNUSED, USER_DEFINED, WHOLE_TOKENS_FIRST, Vocabulary

_NAMES = {pattern: name for name, pattern in CUTS.items()}


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Of a tokenizer of transformers, filled up to `size` tokens. Raises InputError where llama.cpp would cut text in another way."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError("the tokenizer has no tokenizer.json, from which GGUF is written; saving it with transformers would be right")
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece" if model.get("byte_fallback") else model["type"]
        raise InputError(f"the tokenizer is of the type {kind}, and GGUF is written for byte-level BPE")
    cut = _cut(described)
    if bool(model.get("ignore_merges")) != (cut in WHOLE_TOKENS_FIRST):
        raise InputError(f"the tokenizer's ignore_merges={model.get('ignore_merges')} is not what llama.cpp does for {cut!r}")
    tokens, types = _tokens(described, size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    ids = {name: getattr(tokenizer, f"{ours}_token_id") for name, ours in SPECIAL.items()}
    return Vocabulary(
        tokens, types, merges, cut, {name: one for name, one in ids.items() if one is not None}, _adds(tokenizer), tokenizer.chat_template
    )


def _tokens(described: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every token by its number."""
    found = {number: (text, NORMAL) for text, number in described["model"]["vocab"].items()}
    for added in described["added_tokens"]:
        found[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if (most := max(found, default=-1)) >= size:
        raise InputError(f"the tokenizer has a token {most}, and the model's embedding {size} rows")
    filled = [found.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    return [text for text, _ in filled], [kind for _, kind in filled]


def _cut(described: dict[str, Any]) -> str:
    """llama.cpp's name for how text is cut into pieces before merging."""
    parts = described["pre_tokenizer"] or {}
    steps = parts.get("pretokenizers", [parts])
    kinds = [step.get("type") for step in steps]
    name = None
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        name = "smollm"
    elif kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"] and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
        name = _NAMES.get(steps[0]["pattern"].get("Regex", ""))
    # llama.cpp normalizes nothing; of Qwen2's NFC it is known, and text is nearly always in that form.
    normalizer = (described["normalizer"] or {}).get("type")
    if (
        name is None
        or any(step.get("add_prefix_space") for step in steps)
        or normalizer not in ((None, "NFC") if name == "qwen2" else (None,))
    ):
        raise InputError(
            f"the tokenizer cuts text by {kinds} with normalizer {normalizer}, for which this writer knows no name of llama.cpp's; "
            "those of GPT-2, SmolLM, Llama 3 and Qwen2 would be right"
        )
    return name


def _adds(tokenizer: Any) -> dict[str, bool]:
    """Whether a text gets a first and a last special token."""
    ids = tokenizer("a")["input_ids"]
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    longer = len(ids) > len(alone)
    return {"bos": longer and ids[0] == tokenizer.bos_token_id, "eos": longer and ids[-1] == tokenizer.eos_token_id}
