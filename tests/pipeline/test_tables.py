"""The embedding and the head compressed beside the blocks."""

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fewbits.core.errors import BrokenModelError, InputError
from fewbits.core.method import Statistics
from fewbits.methods.weights.apiq import Apiq
from fewbits.methods.weights.compactifai import Compactifai
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.hqq import Hqq
from fewbits.methods.weights.rtn import Rtn
from fewbits.methods.weights.squeezellm import Squeezellm
from fewbits.models.source import open_model
from fewbits.models.vocabulary import Vocabulary
from fewbits.pipeline.dense_pass import DensePass
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import StreamOptions, compress_model
from fewbits.pipeline.tables import EMBEDDING, HEAD
from fewbits.statistics.hessian import Hessian

WINDOWS = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(0))
BLOCKS, EIGHT, HESSIAN = Gptq(bits=4, group_size=16), Rtn(bits=8, group_size=16), Gptq(bits=3, group_size=16)
TABLE, OUTPUT = "model.embed_tokens", "lm_head"


def save(path, **more):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)  # so that what is said depends on the blocks
    model.save_pretrained(path)
    return open_model(path)


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A model whose head is a layer of its own."""
    return save(tmp_path_factory.mktemp("apart"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def head_inputs(model):
    found = Hessian(32)
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: found.update(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in WINDOWS.split(4):
            model(batch)
    hook.remove()
    return found


def put(model, layers):
    with torch.no_grad():
        for name, stored in layers.items():
            model.get_submodule(name).weight.copy_(stored.weight.decode())
    return model


@pytest.mark.parametrize("inputs", ["propagated", "original"])
def test_blocks_and_head_see_what_the_compressed_embedding_gives(apart, tmp_path, inputs):
    """The oracle: a model with the decoded embedding is compressed without tables, and its head's inputs are hooked."""
    made = compress_model(apart, Plan(BLOCKS, embeddings=EIGHT, head=HESSIAN), WINDOWS, tmp_path / "all", StreamOptions(inputs=inputs))
    layers = dict(made.layers())
    table = EIGHT.compress(apart.parameter(f"{TABLE}.weight"), Statistics())
    assert torch.equal(layers[TABLE].weight.decode(), table.decode())
    model = apart.load()
    if inputs == "propagated":
        put(model, {TABLE: layers[TABLE]})
    model.save_pretrained(tmp_path / "oracle")
    plain = dict(
        compress_model(open_model(tmp_path / "oracle"), Plan(BLOCKS), WINDOWS, tmp_path / "work", StreamOptions(inputs=inputs)).layers()
    )
    assert plain.keys() == layers.keys() - {TABLE, OUTPUT}
    for name, stored in plain.items():
        assert torch.equal(stored.weight.decode(), layers[name].weight.decode()), name
    moment = head_inputs(put(model, plain) if inputs == "propagated" else apart.load())
    head = HESSIAN.compress(apart.parameter(f"{OUTPUT}.weight"), Statistics(moment, tokens=WINDOWS.numel()))
    assert torch.allclose(layers[OUTPUT].weight.decode(), head.decode(), atol=1e-5)


def test_the_heads_inputs_make_a_difference(apart, tmp_path):
    """Error feedback on its own inputs loses less than on inputs that are taken to be uncorrelated, which is rounding to nearest."""
    made = compress_model(apart, Plan(BLOCKS, head=HESSIAN), WINDOWS, tmp_path)
    stored = dict(made.layers())[OUTPUT]
    moment = head_inputs(apart.load()).matrix.float()
    weight = apart.parameter(f"{OUTPUT}.weight")
    rounded = Rtn(bits=3, group_size=16).compress(weight, Statistics())
    lost = [float(((part @ moment) * part).sum()) for part in (weight - stored.weight.decode(), weight - rounded.decode())]
    assert lost[0] < 0.8 * lost[1]
    entry = made.record()["layers"][OUTPUT]
    assert entry["tokens"] == WINDOWS.numel() and entry["error_of"] == "outputs"


def test_a_tied_table_is_compressed_and_counted_once(tied, tmp_path):
    made = compress_model(tied, Plan(BLOCKS, head=EIGHT), WINDOWS, tmp_path)
    record, layers = made.record(), dict(made.layers())
    assert TABLE in layers and OUTPUT not in layers and made.parts == (EMBEDDING,)
    assert record["kept"] == {} and record["layers"][TABLE]["weights"] == 64 * 32
    # 8 bits a code, and a scale of 16 bits and a zero point of 8 for every 16
    assert sum(layers[TABLE].bits().values()) == 64 * 32 * 8 + 64 * 2 * (16 + 8)
    assert record["compressed_weights"] == sum(tied.parameter(f"{name}.weight").numel() for name in layers)
    both = compress_model(tied, Plan(BLOCKS, embeddings=EIGHT, head=EIGHT), WINDOWS, tmp_path / "both")
    assert dict(both.layers()).keys() == layers.keys()


def test_the_other_stays_dense_and_is_named(apart, tmp_path):
    made = compress_model(apart, Plan(BLOCKS, embeddings=Hqq(bits=4)), WINDOWS, tmp_path)
    assert made.record()["kept"] == {OUTPUT: "linear layer outside the blocks"}
    made = compress_model(apart, Plan(BLOCKS, head=EIGHT), WINDOWS, tmp_path / "head")
    assert made.record()["kept"] == {TABLE: "embedding"} and made.parts == (HEAD,)


def test_to_a_method_that_asks_a_tables_columns_are_uncorrelated(apart, tmp_path):
    made = compress_model(apart, Plan(BLOCKS, embeddings=HESSIAN), WINDOWS, tmp_path)
    hessian = Hessian(32)
    hessian.update(torch.eye(32))
    expected = HESSIAN.compress(apart.parameter(f"{TABLE}.weight"), Statistics(hessian))
    assert torch.equal(dict(made.layers())[TABLE].weight.decode(), expected.decode())
    assert made.record()["layers"][TABLE]["tokens"] is None and made.record()["silent"] == []


def test_blocks_that_learn_and_a_head_that_follows(apart, tmp_path):
    plan = Plan(Apiq(steps=2, adapter_rank=2, group_size=16), embeddings=EIGHT, head=HESSIAN)
    made = compress_model(apart, plan, WINDOWS, tmp_path)
    moment = head_inputs(_with(apart, made))
    head = HESSIAN.compress(apart.parameter(f"{OUTPUT}.weight"), Statistics(moment, tokens=WINDOWS.numel()))
    assert torch.allclose(dict(made.layers())[OUTPUT].weight.decode(), head.decode(), atol=1e-5)


def _with(source, made):
    model = put(source.load(), {name: stored for name, stored in made.layers() if name != OUTPUT})
    for name, value in made.replaced().items():
        model.get_parameter(name).data.copy_(value)
    return model


def test_a_shared_dense_pass_does_not_stand_for_a_compressed_embedding(apart, tmp_path):
    dense = DensePass(apart, WINDOWS, None, tmp_path / "dense")
    dense.gather([Hessian])
    for inputs in ("propagated", "original"):
        options, plan = StreamOptions(inputs=inputs), Plan(BLOCKS, embeddings=Rtn(bits=2))
        own = dict(compress_model(apart, plan, WINDOWS, tmp_path / f"own-{inputs}", options).layers())
        shared = dict(compress_model(apart, plan, WINDOWS, tmp_path / f"shared-{inputs}", options, None, dense).layers())
        for name, stored in own.items():
            assert torch.allclose(stored.weight.decode(), shared[name].weight.decode(), atol=1e-6), name


def contents(work):
    return {path.name: path.read_bytes() for path in sorted(work.iterdir()) if path.name.startswith(("block-", "part-"))}


@pytest.mark.parametrize("stop_at", [0, 2])
def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(apart, tmp_path, monkeypatch, stop_at):
    plan = Plan(BLOCKS, embeddings=EIGHT, head=HESSIAN)
    compress_model(apart, plan, WINDOWS, tmp_path / "whole")
    assert {"part-embedding.json", "part-head.safetensors", "block-00002.json"} <= contents(tmp_path / "whole").keys()

    def stop(block, *_):
        if block == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(apart, plan, WINDOWS, tmp_path / "stopped", StreamOptions(progress=stop))
    solved = []
    monkeypatch.setattr(Rtn, "compress", lambda *_: solved.append("embedding"))
    compress_model(apart, plan, WINDOWS, tmp_path / "stopped")
    assert solved == []  # what was stored is not made again
    assert contents(tmp_path / "whole") == contents(tmp_path / "stopped")


def test_a_run_with_other_tables_is_another_run(apart, tmp_path):
    compress_model(apart, Plan(BLOCKS, embeddings=EIGHT), WINDOWS, tmp_path)
    with pytest.raises(InputError, match=r"embeddings\.bits was 8, now 4.*--fresh"):
        compress_model(apart, Plan(BLOCKS, embeddings=Rtn(bits=4, group_size=16)), WINDOWS, tmp_path)


def test_where_the_tables_are(apart, tied, tmp_path):
    assert Vocabulary.of(apart.shell()) == Vocabulary(TABLE, OUTPUT, tied=False)
    assert Vocabulary.of(tied.shell()) == Vocabulary(TABLE, OUTPUT, tied=True)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    assert Vocabulary.of(gpt2) == Vocabulary("transformer.wte", "lm_head", tied=True)
    bert = BertModel(BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    assert Vocabulary.of(bert) == Vocabulary("embeddings.word_embeddings", None, tied=False)
    assert Vocabulary.of(torch.nn.Linear(2, 2)) is None


def test_what_cannot_be_done_is_said_before_anything_is(apart, tied, tmp_path):
    bert = BertModel(BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    bert.save_pretrained(tmp_path / "bert")
    wrong = {
        "has no output head": (open_model(tmp_path / "bert"), Plan(BLOCKS, head=EIGHT)),
        "one method for both would be right": (tied, Plan(BLOCKS, embeddings=EIGHT, head=Rtn(bits=4))),
        "squeezellm compresses no embedding or head by itself": (apart, Plan(BLOCKS, head=Squeezellm())),
        "compactifai compresses no embedding": (apart, Plan(BLOCKS, embeddings=Compactifai())),
        "apiq compresses no embedding": (apart, Plan(BLOCKS, head=Apiq())),
    }
    for says, (source, plan) in wrong.items():
        with pytest.raises(InputError, match=says):
            compress_model(source, plan, WINDOWS, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_broken_table_stops_the_run(tmp_path):
    model = save(tmp_path / "good").load()
    model.model.embed_tokens.weight.data[3, 3] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(BrokenModelError, match=r"model\.embed_tokens: the weight is not finite"):
        compress_model(open_model(tmp_path / "broken"), Plan(BLOCKS, embeddings=EIGHT), WINDOWS, tmp_path / "work")
