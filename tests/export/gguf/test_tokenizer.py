"""How tokenizers of transformers are named for llama.cpp, and what is refused."""

import pytest
import transformers as hf
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from fewbits.core.errors import InputError
from fewbits.export.gguf.tokenizer import read_vocabulary

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern):
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


CUTS = {
    "gpt-2": (byte_level, False),
    "smollm": (lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]), False),
    "llama-bpe": (lambda: split(CONTRACTIONS + r"\p{N}{1,3}" + REST), True),
    "qwen2": (lambda: split(CONTRACTIONS + r"\p{N}" + REST), False),
}


def made(cut, ignore_merges=False, normalizer=None, **options):
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")], ignore_merges=ignore_merges, **options))
    backend.pre_tokenizer = cut
    if normalizer is not None:
        backend.normalizer = normalizer
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", additional_special_tokens=["<tool>"])


@pytest.mark.parametrize("name", list(CUTS))
def test_how_text_is_cut_has_a_name(name):
    cut, whole = CUTS[name]
    found = read_vocabulary(made(cut(), whole), 8)
    assert found.cut == name and found.merges == ["a b"]
    assert found.tokens == ["a", "b", "ab", "</s>", "<tool>", "[PAD5]", "[PAD6]", "[PAD7]"]
    assert found.types == [1, 1, 1, 3, 3, 5, 5, 5] and found.ids == {"eos": 3} and found.adds == {"bos": False, "eos": False}
    with pytest.raises(InputError, match=f"ignore_merges={not whole} is not what llama.cpp does for '{name}'"):
        read_vocabulary(made(cut(), not whole), 8)


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        (lambda: made(pre_tokenizers.Whitespace()), r"cuts text by \['Whitespace'\]"),
        (lambda: made(split(r"\w+")), r"cuts text by \['Split', 'ByteLevel'\]"),
        (lambda: made(pre_tokenizers.ByteLevel(add_prefix_space=True)), r"cuts text by \['ByteLevel'\]"),
        (lambda: made(byte_level(), normalizer=normalizers.Lowercase()), "normalizer Lowercase"),
        (lambda: made(byte_level(), byte_fallback=True), "is of the type SentencePiece"),
        (lambda: object(), "has no tokenizer.json"),
    ],
)
def test_what_llama_cpp_would_do_otherwise_is_refused(tokenizer, says):
    with pytest.raises(InputError, match=says):
        read_vocabulary(tokenizer(), 8)


def test_more_tokens_than_rows_of_the_embedding_are_refused():
    with pytest.raises(InputError, match="a token 4, and the model's embedding 4 rows"):
        read_vocabulary(made(byte_level()), 4)
