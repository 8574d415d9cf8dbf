import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fewbits
from fewbits import caches
from fewbits.core.errors import InputError
from fewbits.evaluation.retrieval import FORMS, WORDS, Form, Questions, hide, retrieve, share
from fewbits.methods.kvcache.gear import Gear
from fewbits.methods.kvcache.kivi import Kivi
from fewbits.models.hf_cache import CompressedCache, cache_keyword
from fewbits.models.source import open_model


class Letters:
    """A token for every letter."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(letter) for letter in text]


SHORT = Form("<{key}=", "{value}", ">")


def told(tokens):
    return "".join(chr(one) for one in tokens)


@pytest.mark.parametrize("form", [*FORMS, SHORT])
@pytest.mark.parametrize(("needles", "distance"), [(1, 0), (1, 130), (4, 250)])
def test_needles_lie_where_they_are_said_to(form, needles, distance):
    windows = torch.arange(3 * 700).view(3, 700) * 7 % 10 + ord("0")  # text of digits alone
    questions, shape = hide(Letters(), windows, form, distance=distance, needles=needles), FORMS.get(form, form)
    assert questions.contexts.shape == (3, 700) and len(set(questions.answers)) == 3
    for context, window, asked, answer in zip(questions.contexts.tolist(), windows, questions.asked, questions.answers, strict=True):
        text, needle = told(context), (told(asked) + told(answer) + shape.rest) * shape.times
        assert text.count(needle) == 1 and text.index(needle) + len(needle) + distance == 700
        key = told(asked)[len(shape.question.split("{")[0]) : len(told(asked)) - len(shape.question.split("}")[1])]
        assert len({*key.split("_"), told(answer).strip()} & set(WORDS)) == 3
        for word in WORDS:
            text = text.replace(word, "?")
        starts = shape.question.format(key="?_?")
        assert text.count(starts) == needles * shape.times  # all keys are two words
        behind = told(context[700 - distance :]) if distance else ""
        assert behind.count(shape.question.split("{")[0]) == needles // 2 * shape.times
        kept = [letter for letter in context if chr(letter).isdigit()]
        assert kept == window[: len(kept)].tolist()  # nothing of the text is missing but its end


def test_needles_that_do_not_fit_are_refused():
    windows = torch.full((1, 100), 48)
    hide(Letters(), windows, SHORT, distance=60)
    with pytest.raises(InputError, match="distance=95 is out of range; 0 to"):
        hide(Letters(), windows, SHORT, distance=95)
    with pytest.raises(InputError, match="distance=10 is out of range"):
        hide(Letters(), windows, SHORT, distance=10, needles=3)
    with pytest.raises(InputError, match="needles=0"):
        hide(Letters(), windows, SHORT, distance=10, needles=0)
    with pytest.raises(InputError, match="'def' is not known; passkey, function, class are"):
        hide(Letters(), windows, "def", distance=10)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, initializer_range=0.4)).eval()


def drawn(*shape):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_an_answer_is_what_the_model_writes_token_for_token(model):
    """Asked are eight contexts at random, and the answers are those that generate writes, or with one token exchanged."""
    contexts, asked = drawn(8, 30), [tuple(one) for one in drawn(8, 5).tolist()]
    for few in (0, 2):  # questions of several lengths
        questions = [one[:3] if number < few else one for number, one in enumerate(asked)]
        answers = []
        for context, question in zip(contexts, questions, strict=True):
            prompt = torch.cat([context, torch.tensor(question)])[None]
            settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            answers.append(tuple(model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0, prompt.shape[1] :].tolist()))
        answers[1] = (*answers[1][:3], answers[1][3] ^ 1)
        answers[4] = (answers[4][0] ^ 1, *answers[4][1:])
        asking = Questions(contexts, tuple(questions), tuple(answers))
        for opened in (lambda: DynamicCache(config=model.config), lambda: CompressedCache(model, Kivi(residual=64))):
            hits, memory = retrieve(model, asking, opened, batch_size=3)
            assert hits.tolist() == [True, False, True, True, False, True, True, True]
        assert memory["bits_per_element"] == 32  # nothing was sealed


@torch.no_grad()
def test_what_is_read_behind_the_context_finds_it_as_it_is_stored(model):
    """One by one, behind a context that was sealed: the answers are the compressed cache's, not the dense one's."""
    contexts, asked = drawn(12, 32), tuple(tuple(one) for one in drawn(12, 3).tolist())
    method, answers = Gear(bits=2, group_size=8, buffer=8, prompt_rank=0, outliers=0.0), []
    for context, question in zip(contexts, asked, strict=True):
        given = {cache_keyword(model): CompressedCache(model, method)}
        model(input_ids=context[None], **given)
        given[cache_keyword(model)].flush()
        logits, answer = model(input_ids=torch.tensor([question]), **given).logits, []
        for _ in range(2):  # with the question fewer than are sealed together
            answer.append(int(logits[0, -1].argmax()))
            logits = model(input_ids=torch.tensor([answer[-1:]]), **given).logits
        answers.append(tuple(answer))
    questions = Questions(contexts, asked, tuple(answers))
    ours, memory = retrieve(model, questions, lambda: CompressedCache(model, method))
    dense, nothing = retrieve(model, questions, lambda: DynamicCache(config=model.config))
    assert bool(ours.all()) and int(dense.sum()) < 9 and not nothing
    assert memory["sealed_bits_per_element"] == pytest.approx(2 + 32 / 8)


def test_the_interval_is_wilsons():
    part, low, high = share(torch.arange(10) < 8)  # 0.490 to 0.943
    assert part == 0.8 and low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)
    assert share(torch.zeros(20).bool())[:2] == (0, 0) and share(torch.zeros(20).bool())[2] == pytest.approx(0.1611, abs=1e-4)


@pytest.mark.slow
def test_the_built_in_model_retrieves_and_a_coarse_cache_does_not():
    model, tokenizer = fewbits.load("builtin:tiny-lm"), open_model("builtin:tiny-lm").tokenizer()
    windows = fewbits.TextSample("builtin:heldout", 32, 128).windows(tokenizer)
    questions = hide(tokenizer, windows, "function", distance=40)
    caches_ = [lambda: DynamicCache(config=model.config)]
    caches_ += [lambda bits=bits: caches.open(model, "kivi", bits=bits, group_size=32, residual=32) for bits in (4, 1)]
    dense, fine, coarse = (float(retrieve(model, questions, one)[0].double().mean()) for one in caches_)
    assert dense > 0.4 and fine > 0.7 * dense and coarse < 0.5 * dense
