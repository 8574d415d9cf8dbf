"""Folders whose embedding or head is compressed: written, loaded by both ways, measured, and written for others or refused."""

import json

import jsonschema
import pytest
import torch
import transformers as hf
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

from fewbits import TextSample, api
from fewbits.core.errors import InputError
from fewbits.core.record import schema
from fewbits.evaluation.speed import bytes_read, densified, measure_layers
from fewbits.evaluation.streamed import StreamedModel
from fewbits.export.checkpoint import read_tables, write_checkpoint
from fewbits.export.run import export, holders
from fewbits.export.target import get_target, list_targets
from fewbits.export.targets.dense import Dense
from fewbits.layers.embedding import CompressedEmbedding, TiedHead
from fewbits.layers.linear import CompressedLinear, stored_bits
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.source import open_model
from fewbits.models.vocabulary import Vocabulary
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import compress_model

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA_LIKE = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_LIKE)),
    "tied llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True)),
    "gemma3, whose rows are scaled": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**LLAMA_LIKE, head_dim=8, sliding_window=8)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**COMMON, intermediate_size=48)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**COMMON, intermediate_size=48)),
}
WINDOWS = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0))
PLAN = Plan(Gptq(bits=4, group_size=16), embeddings=Rtn(bits=8, group_size=16), head=Rtn(bits=8, group_size=16))


def written(model, path, plan):
    """A folder of `model` compressed by `plan`, as `compress` writes it but for the record."""
    torch.manual_seed(0)
    model.save_pretrained(path / "dense")
    source = open_model(path / "dense")
    plan = Plan(plan.method, embeddings=plan.embeddings, head=None if source.is_encoder else plan.head)
    summary = compress_model(source, plan, WINDOWS, path / "work")
    record = {"results": summary.record()}
    write_checkpoint(path / "out", source, summary.layers, lambda _: (record, ""), replaced=summary.replaced())
    return path / "out"


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return written(MODELS["tied llama"](), tmp_path_factory.mktemp("tied"), PLAN)


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    return written(MODELS["llama"](), tmp_path_factory.mktemp("apart"), PLAN)


def outputs(model, batch=WINDOWS):
    with torch.no_grad():
        return model(input_ids=batch)[0]


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_read_back_by_both_ways_and_computes_with_the_decoded_tables(kind, tmp_path):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    folder = written(model, tmp_path, PLAN)
    loaded = api.load(folder)
    names = Vocabulary.of(model)
    assert isinstance(loaded.get_submodule(names.embedding), CompressedEmbedding)
    if names.head is not None:
        assert type(loaded.get_submodule(names.head)) is (TiedHead if names.tied else CompressedLinear)
    dense = densified(loaded, torch.float32)
    assert torch.allclose(outputs(loaded), outputs(dense), atol=1e-5)
    kind_of = AutoModel if names.head is None else AutoModelForCausalLM
    again, said = kind_of.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    assert torch.equal(outputs(again.eval()), outputs(loaded))
    again.save_pretrained(tmp_path / "again")
    third = kind_of.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(outputs(third.eval()), outputs(loaded))
    half = kind_of.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.get_submodule(names.embedding)(WINDOWS).dtype == torch.bfloat16 and bool(outputs(half).isfinite().all())


def test_the_outputs_are_near_those_of_the_dense_model(tied, apart):
    for folder in (tied, apart):
        whole, ours = outputs(api.load(folder.parent / "dense")), outputs(api.load(folder))
        assert float((whole - ours).norm() / whole.norm()) < 0.1


def test_a_tied_table_lies_in_the_file_once(tied, apart):
    with safe_open(tied / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert any(name.startswith("model.embed_tokens.weight__") for name in names) and not any("lm_head" in name for name in names)
    bits = {folder: stored_bits(api.load(folder)) for folder in (tied, apart)}
    for folder in (tied, apart):
        record = json.loads((folder / "fewbits.json").read_text())
        assert sum(record["results"]["bits"].values()) == bits[folder] and not record["results"]["kept"]
    assert bits[apart] - bits[tied] == 64 * 32 * 8 + 64 * 2 * 24


def test_evaluated_block_by_block_it_is_the_same_model(tied, apart):
    for folder in (tied, apart):
        streamed = StreamedModel(folder, WINDOWS)
        assert torch.allclose(streamed(input_ids=WINDOWS).logits, outputs(api.load(folder)), atol=1e-5)
        assert set(read_tables(folder)) == ({"model.embed_tokens"} if folder == tied else {"model.embed_tokens", "lm_head"})


def test_what_a_token_reads_counts_a_tied_table_and_no_looked_up_one(tied, apart):
    models = {folder: api.load(folder) for folder in (tied, apart)}
    head = 64 * 32 + 64 * 2 * 3
    assert bytes_read(models[tied]) == bytes_read(models[apart])  # the head is read in both, the embedding's rows are not
    dense = densified(models[tied], torch.bfloat16)
    assert bytes_read(dense) > bytes_read(models[tied]) and outputs(dense).dtype == torch.bfloat16
    assert dense.lm_head.table is dense.model.embed_tokens
    rows = {tuple(row["shape"]): row for row in measure_layers(models[tied], torch.float32, rounds=1)}
    assert rows[64, 32]["bytes"] == head and rows[64, 32]["layers"] == 1


def test_formats_that_keep_tables_dense_say_so_and_name_one_that_does_not(tied, apart, tmp_path):
    name = "model.embed_tokens"
    for folder in (tied, apart):
        for format_name in list_targets():
            target = get_target(format_name)
            if target.holds_tables:
                continue
            with pytest.raises(InputError, match=f"{format_name} cannot hold {name}: it keeps embedding and head dense; .*dense"):
                export(folder, target, tmp_path / "out", requantize=folder == tied)
        assert "dense" in holders(folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["tied", "apart"])
def test_a_dense_export_holds_the_decoded_tables(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    export(folder, Dense(), tmp_path / "out")
    model, said = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert torch.equal(model.model.embed_tokens.weight, api.load(folder).model.embed_tokens.weight)
    assert torch.equal(model.lm_head.weight, api.load(folder).lm_head.weight)
    assert torch.allclose(outputs(model), outputs(api.load(folder)), atol=1e-5)


@pytest.mark.slow
def test_all_the_verbs_take_such_a_folder(first_blocks, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(40)))
    sample = TextSample(str(tmp_path / "text.txt"), 2, 32)
    plan = Plan(Rtn(bits=4, group_size=32), embeddings=Rtn(bits=8, group_size=32))
    record = api.compress(first_blocks, plan, tmp_path / "out", calibration=sample, probe=sample)
    jsonschema.validate(record, schema())
    assert record["settings"]["plan"]["embeddings"]["bits"] == 8 and record["results"]["kept"] == {}
    assert record["results"]["file_bits_per_weight"] < 8 and record["results"]["probe"]["kl_mean"] > 0
    assert "Kept as they were: no matrices." in (tmp_path / "out" / "README.md").read_text()
    streams = [api.evaluate(tmp_path / "out", reference=first_blocks, text=sample, streamed=one)["results"] for one in (False, True)]
    assert streams[0]["perplexity"] == pytest.approx(streams[1]["perplexity"], rel=1e-4)
    assert api.generate(tmp_path / "out", "def ", max_new_tokens=3).startswith("def ")
