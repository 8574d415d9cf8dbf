"""Texts by name, and windows of tokens drawn from them."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.core.errors import InputError, reason_of
from fewbits.data.standard_library import calibration_documents, heldout_documents

_BUILTIN: dict[str, Callable[[], list[str]]] = {"heldout": heldout_documents, "calibration": calibration_documents}
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<configuration>[\w.-]+))?(:(?P<split>[\w.%\[\]:-]+))?")
_FILES = (".txt", ".jsonl", ".parquet", ".json", ".csv", ".md")  # a missing file of these is not looked for on the hub


def load_text(name: str) -> list[str]:
    """The documents of a text file (one), of a .jsonl or .parquet file (the field "text" of each row), or `builtin:NAME`.

    A name `owner/name`, `owner/name:split` or `owner/name/configuration:split` that is no file is a data set on the Hugging Face hub
    (split "train" where none is said). Raises InputError where the name is unknown, the file is missing or unreadable, there
    is no text in it, or the extra that reads it is not installed.
    """
    if name.startswith("builtin:"):
        if name.removeprefix("builtin:") not in _BUILTIN:
            raise InputError(f"{name!r} is no built-in text; {' or '.join(f'builtin:{known}' for known in _BUILTIN)} would be right")
        return _BUILTIN[name.removeprefix("builtin:")]()
    path = Path(name)
    if path.is_file():
        documents = _parquet(path) if path.suffix == ".parquet" else _text_file(path)
    elif (hub := _HUB_NAME.fullmatch(name)) and path.suffix not in _FILES and not path.parent.exists():
        documents = _from_hub(hub)
    else:
        raise InputError(
            f"the text {name!r} is not a file; a .txt, .jsonl or .parquet file, owner/name:split on the hub, or builtin:calibration, "
            "would be right"
        )
    if not any(document.strip() for document in documents):
        raise InputError(f"{name} holds no text")
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


def _text_file(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    return _json_lines(path, content) if path.suffix == ".jsonl" else [content]


def _parquet(path: Path) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(f"{path} is read by pyarrow; pip install 'fewbits[data]' would be right") from error
    try:
        names = parquet.read_schema(path).names
        rows = parquet.read_table(path, columns=["text"])["text"].to_pylist() if "text" in names else None
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet ({str(error).splitlines()[0]}); it may be cut short: copy it again") from error
    return _documents(str(path), rows, names)


def _from_hub(name: re.Match[str]) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"{name[0]!r} is no file here; the hub's data sets are read by the package datasets: pip install 'fewbits[data]' would be right"
        ) from error
    try:
        rows = load_dataset(name["name"], name["configuration"], split=name["split"] or "train")
    except Exception as error:  # it raises whatever its many readers raise
        reason = reason_of(error)
        raise InputError(f"{name[0]!r} is no file here, and the hub did not give it ({reason}); a text file would be right") from error
    return _documents(name[0], rows["text"] if "text" in rows.column_names else None, rows.column_names)


def _documents(where: str, rows: Sequence[Any] | None, names: Sequence[str]) -> list[str]:
    """The texts of a table's column "text"; rows without one are left out."""
    if rows is None:
        raise InputError(f'{where} has the columns {", ".join(names)}; one called "text" would be right')
    return [row for row in rows if isinstance(row, str)]


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
