"""Texts by name, and windows of tokens drawn from them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.data.standard_library import calibration_documents, heldout_documents

_BUILTIN: dict[str, Callable[[], list[str]]] = {"heldout": heldout_documents, "calibration": calibration_documents}


def load_text(name: str) -> list[str]:
    """The documents of a .txt file (one), a .jsonl file (the field "text" of each line), or `builtin:NAME`.

    Raises InputError where the name is unknown, the file is missing or unreadable, or there is no text in it.
    """
    if name.startswith("builtin:"):
        if name.removeprefix("builtin:") not in _BUILTIN:
            raise InputError(f"{name!r} is no built-in text; {' or '.join(f'builtin:{known}' for known in _BUILTIN)} would be right")
        return _BUILTIN[name.removeprefix("builtin:")]()
    path = Path(name)
    if not path.is_file():
        raise InputError(f"the text {name!r} is not a file; a .txt or .jsonl file, or builtin:calibration, would be right")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    documents = _json_lines(path, content) if path.suffix == ".jsonl" else [content]
    if not any(document.strip() for document in documents):
        raise InputError(f"{path} holds no text")
    return documents


@dataclass(frozen=True)
class TextSample:
    """Which tokens to run: windows drawn from a text by seed."""

    data: str = "builtin:calibration"
    count: int = 128
    length: int = 512
    seed: int = 0
    separate: bool = False  # each document in a window of its own, padded at the right, instead of one text cut into windows

    def windows(self, tokenizer: Any) -> Tensor:
        """int64 `[at most count, length]`; raises InputError as `load_text` and `token_windows` do."""
        return token_windows(tokenizer, load_text(self.data), self.length, self.count, self.seed)

    def batch(self, tokenizer: Any) -> tuple[Tensor, Tensor | None]:
        """`windows`, and which of their tokens are text, bool of the same shape; None where all are."""
        if not self.separate:
            return self.windows(tokenizer), None
        return document_windows(tokenizer, load_text(self.data), self.length, self.count, self.seed)

    def lines(self) -> list[str]:
        """At most `count` different lines of 20 characters or more, drawn by seed. Raises InputError where there are none."""
        found = sorted({line.strip() for document in load_text(self.data) for line in document.splitlines() if len(line.strip()) >= 20})
        if not found:
            raise InputError(f"{self.data!r} holds no line of 20 characters or more")
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(self.seed))[: self.count]
        return [found[index] for index in order.tolist()]


def token_windows(tokenizer: Any, documents: Sequence[str], length: int, count: int, seed: int | None = None) -> Tensor:
    """int64 `[count, length]`: windows of the documents' tokens, documents joined by the tokenizer's end mark.

    Windows do not overlap. With a seed they are drawn at random from the whole text, else they are the first ones; where
    the text holds fewer, all are returned. Raises InputError for a text of less than one window.
    """
    if length < 2 or count < 1:
        raise InputError(f"windows of {length} tokens, {count} of them: at least 2 tokens and 1 window would be right")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for document in documents:
        tokens += end + tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(tokens) // length
    if available == 0:
        raise InputError(f"the text is too short: {len(tokens)} tokens, and one window takes {length}; use more text or a smaller length")
    windows = torch.tensor(tokens[: available * length], dtype=torch.int64).view(available, length)
    if seed is None:
        return windows[:count]
    return windows[torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]]


def document_windows(tokenizer: Any, documents: Sequence[str], length: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The beginnings of at most `count` documents, drawn by seed: tokens int64 `[count, length]` and which are text, bool.

    The length shrinks to the longest document's. Raises InputError where no document has two tokens.
    """
    if length < 2 or count < 1:
        raise InputError(f"windows of {length} tokens, {count} of them: at least 2 tokens and 1 window would be right")
    found = [tokenizer(document, verbose=False)["input_ids"][:length] for document in documents if document.strip()]
    found = [tokens for tokens in found if len(tokens) > 1]
    if not found:
        raise InputError("the text is too short: no document has two tokens")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]
    chosen = [torch.tensor(found[index], dtype=torch.int64) for index in order.tolist()]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    tokens = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(one) for one in chosen])
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def _json_lines(path: Path, content: str) -> list[str]:
    documents = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            documents.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'{path}, line {number}: not an object with the field "text" ({error})') from error
    return documents
