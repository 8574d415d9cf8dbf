"""Tokenizers of GGUF files: the same numbers for a text as those of the tokenizer that was written."""

import gguf
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fewbits.core.errors import InputError
from fewbits.export.gguf.file import write_file
from fewbits.export.gguf.tokenizer import read_vocabulary
from fewbits.models.gguf.file import GgufFile
from fewbits.models.gguf.terms import plain
from fewbits.models.gguf.vocabulary import CUTS, tokenizer_of

TEXT = ["def f(x):\n    return {'ü': 12345, \"don't\": x}  # ∑", "Naïve façade, 2024-05-17!\r\n\n  WE'LL see", "a  b   c\t\td <tool>x</s>"]


def byte_level(**options):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def cutter(name):
    if name in CUTS:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CUTS[name]), "isolated"), byte_level(use_regex=False)])
    return byte_level() if name == "gpt-2" else pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])


@pytest.fixture(scope="module")
def original():
    """A tokenizer that was trained on a little text, by the name of its cut; `starts`: a first token before every text."""

    def make(name, starts=False):
        backend = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
        backend.pre_tokenizer, backend.decoder = cutter(name), decoders.ByteLevel()
        if name == "qwen2":
            backend.normalizer = normalizers.NFC()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(TEXT * 3, trainer)
        if starts:
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
        made = hf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
        made.add_tokens(["<tool>"])
        made.chat_template = "{% for one in messages %}{{ one['content'] }}</s>{% endfor %}"
        return made

    return make


def through_a_file(tokenizer, path, size=400):
    write_file(
        path, {"general.architecture": "llama"}, read_vocabulary(tokenizer, size), lambda: [("token_embd.weight", plain(torch.zeros(2, 2)))]
    )
    return tokenizer_of(GgufFile(path))


@pytest.mark.parametrize("name", ["gpt-2", "smollm", *CUTS])
@pytest.mark.parametrize("starts", [False, True])
def test_text_gets_the_same_numbers_and_comes_back(name, starts, original, tmp_path):
    ours = original(name, starts)
    theirs = through_a_file(ours, tmp_path / "one.gguf")
    for text in TEXT:
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == ours.decode(
            ours(text)["input_ids"], skip_special_tokens=True
        )
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_token_id, ours.eos_token_id)
    messages = [{"role": "user", "content": "hello"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == ours.apply_chat_template(messages, tokenize=False) == "hello</s>"


@pytest.fixture(scope="module")
def pair(original, tmp_path_factory):
    ours = original("llama-bpe")
    return ours, through_a_file(ours, tmp_path_factory.mktemp("pair") / "one.gguf")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_gets_the_same_numbers(pair, text):
    ours, theirs = pair
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]


def written(path, **settings):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(settings.get("model", "gpt2"))
    writer.add_tokenizer_pre(settings.get("pre", "gpt-2"))
    writer.add_token_list(settings.get("tokens", ["a", "b", "ab"]))
    writer.add_token_types(settings.get("types", [1, 1, 1]))
    writer.add_token_merges(["a b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def test_other_names_and_defaults_of_llama_cpp_are_known(tmp_path):
    made = tokenizer_of(written(tmp_path / "one.gguf", pre="llama-v3"))
    assert made("ab")["input_ids"] == [2] and made.bos_token is None
    assert "ignore_merges" in made.backend_tokenizer.to_str() and '"ignore_merges":true' in made.backend_tokenizer.to_str()


def test_sentencepiece_merges_by_scores(tmp_path):
    """By hand: the best of all pairs first, a space before the text, bytes for what is no token."""
    pieces = {"▁": -100, "a": -101, "b": -102, "c": -103, "ab": -1, "▁a": -3, "▁ab": -2, "abc": -4}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [float(score) for score in pieces.values()])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(pieces))
    for name, number in (("bos", 1), ("eos", 2), ("unknown", 0)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    writer.add_add_bos_token(True)
    for name in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{name}", 8)  # transformers looks at these too
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = tokenizer_of(GgufFile(tmp_path / "one.gguf"))
    for text, found in (("abc", ["<s>", "▁ab", "c"]), ("a b", ["<s>", "▁a", "▁", "b"]), ("aé", ["<s>", "▁a", "<0xC3>", "<0xA9>"])):
        assert [tokens[number] for number in made(text)["input_ids"]] == found


def test_a_file_without_a_tokenizer_says_so(tmp_path):
    write_file(tmp_path / "one.gguf", {"general.architecture": "llama"}, None, lambda: [("token_embd.weight", plain(torch.zeros(2, 2)))])
    with pytest.raises(InputError, match=r"one\.gguf holds no tokenizer"):
        tokenizer_of(GgufFile(tmp_path / "one.gguf"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"pre": "tekken"}, "cuts text as llama.cpp calls 'tekken', and this reader knows gpt-2, smollm, llama-bpe, qwen2"),
        ({"types": [1, 1]}, "holds 3 tokens and types of 2; as many of both would be right"),
        ({"model": "bert"}, "holds a tokenizer of the kind 'bert', which cannot be read"),
    ],
)
def test_what_is_not_known_or_damaged_is_one_line(given, says, tmp_path):
    with pytest.raises(InputError, match=says) as raised:
        tokenizer_of(written(tmp_path / "one.gguf", **given))
    assert "\n" not in str(raised.value) and "one.gguf" in str(raised.value)
