"""A byte-level BPE as GGUF files hold it: tokens, merges, and the name by which llama.cpp knows how text is cut before merging."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fewbits.core.errors import InputError, reason_of
from fewbits.models.gguf.file import GgufFile

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CUTS = {  # llama.cpp's name, to the pattern of a tokenizer that splits before its bytes are mapped
    "llama-bpe": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
WHOLE_TOKENS_FIRST = {"llama-bpe"}  # where llama.cpp takes a piece that is a token without merging
_OTHER_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "gpt2": "gpt-2"}
_STARTS = {"llama-bpe"}  # where llama.cpp puts the first special token before a text unless the file says otherwise
SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # what llama.cpp and what transformers calls a token
_KEY = "tokenizer.ggml."


@dataclass(frozen=True)
class Vocabulary:
    """`ids` are those of special tokens by llama.cpp's name, `adds` whether it puts them around every text."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    cut: str
    ids: dict[str, int]
    adds: dict[str, bool] = field(default_factory=dict)
    template: str | None = None  # of a chat


def tokenizer_of(file: GgufFile) -> Any:
    """The tokenizer of a file, as transformers has it. Raises InputError where there is none or it cuts text in an unknown way."""
    kind = file.settings.get(f"{_KEY}model")
    if kind is None:
        raise InputError(f"{file.path} holds no tokenizer; a file of the whole model would be right")
    if kind == "gpt2":
        return _made(_vocabulary(file))
    try:  # SentencePiece, whose scores transformers turns into merges
        return AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except Exception as error:  # tokenizers raises plain exceptions
        raise InputError(f"{file.path} holds a tokenizer of the kind {kind!r}, which cannot be read ({reason_of(error)})") from error


def _vocabulary(file: GgufFile) -> Vocabulary:
    said = str(file.settings.get(f"{_KEY}pre", "default"))
    cut = _OTHER_NAMES.get(said, said)
    if cut not in ("gpt-2", "smollm", *CUTS):
        known = ", ".join(["gpt-2", "smollm", *CUTS])
        raise InputError(f"{file.path} holds a tokenizer that cuts text as llama.cpp calls {said!r}, and this reader knows {known}")
    tokens = [str(token) for token in file.array(f"{_KEY}tokens")]
    types = [int(kind) for kind in file.array(f"{_KEY}token_type")] or [NORMAL] * len(tokens)
    if not tokens or len(types) != len(tokens):
        raise InputError(f"{file.path} holds {len(tokens)} tokens and types of {len(types)}; as many of both would be right")
    found = {name: file.settings.get(f"{_KEY}{name}_token_id") for name in SPECIAL}
    adds = {name: bool(file.settings.get(f"{_KEY}add_{name}_token", name == "bos" and cut in _STARTS)) for name in ("bos", "eos")}
    template = file.settings.get("tokenizer.chat_template")
    ids = {name: int(number) for name, number in found.items() if number is not None and int(number) < len(tokens)}
    merges = [str(merge) for merge in file.array(f"{_KEY}merges")]
    return Vocabulary(tokens, types, merges, cut, ids, adds, None if template is None else str(template))


def _made(held: Vocabulary) -> Any:
    numbers = {token: number for number, token in enumerate(held.tokens) if held.types[number] != UNUSED}
    merges = [(first, second) for first, _, second in (merge.partition(" ") for merge in held.merges)]
    made = Tokenizer(models.BPE(vocab=numbers, merges=merges, ignore_merges=held.cut in WHOLE_TOKENS_FIRST))
    if held.cut == "qwen2":
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer, made.decoder = _cutter(held.cut), decoders.ByteLevel()
    for token, kind in zip(held.tokens, held.types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            added = AddedToken(token, normalized=False, special=kind == CONTROL)
            (made.add_special_tokens if kind == CONTROL else made.add_tokens)([added])
    special = {name: held.tokens[number] for name, number in held.ids.items()}
    first, last = ([f"{special[name]}:0"] if held.adds.get(name) and name in special else [] for name in ("bos", "eos"))
    if first or last:
        around = [(special[name], held.ids[name]) for name in ("bos", "eos") if name in special]
        made.post_processor = processors.TemplateProcessing(
            single=[*first, "$A:0", *last],
            pair=[*first, "$A:0", *last, *(f"{one[:-2]}:1" for one in first), "$B:1", *(f"{one[:-2]}:1" for one in last)],
            special_tokens=around,
        )
    named = {f"{SPECIAL[name]}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=held.template, clean_up_tokenization_spaces=False, **named)


def _cutter(cut: str) -> Any:
    if cut in CUTS:
        pieces = pre_tokenizers.Split(Regex(CUTS[cut]), "isolated")
        return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return whole if cut == "gpt-2" else pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
