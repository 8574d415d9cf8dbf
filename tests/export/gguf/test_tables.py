"""GGUF files whose embedding or head is of a block type: written of compressed tables, and read as such."""

import pytest
import torch
import transformers as hf

import fewbits
from fewbits.core.errors import InputError
from fewbits.export.checkpoint import write_checkpoint
from fewbits.export.run import export
from fewbits.export.targets.gguf import Gguf
from fewbits.formats.uniform import Uniform
from fewbits.layers.embedding import CompressedEmbedding, TiedHead
from fewbits.layers.linear import CompressedLinear
from fewbits.methods.weights.rtn import Rtn
from fewbits.models.gguf.file import GgufFile
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import compress_model

SIZES = {"vocab_size": 4104, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
IDS = torch.randint(4000, (2, 24), generator=torch.Generator().manual_seed(0))
FOUR, EIGHT = Rtn(bits=4, group_size=32, symmetric=True), Rtn(bits=8, group_size=32, symmetric=True)


@pytest.fixture
def folder(tmp_path):
    """Writes a folder, compressed by `plan`, of a model with a head of its own or a tied one."""

    def make(plan, tied):
        torch.manual_seed(0)
        hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=tied)).save_pretrained(tmp_path / "model")
        open_model("builtin:tiny-lm").tokenizer().save_pretrained(tmp_path / "model")
        source = open_model(tmp_path / "model")
        summary = compress_model(source, plan, torch.zeros(1, 4, dtype=torch.int64), tmp_path / "work")
        write_checkpoint(tmp_path / "out", source, summary.layers, lambda _: ({}, ""))
        return tmp_path / "out"

    return make


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("tied", [True, False])
def test_compressed_tables_are_written_as_they_are_and_read_back(folder, tied, tmp_path):
    small = folder(Plan(FOUR, embeddings=EIGHT, head=EIGHT if tied else FOUR), tied)
    export(small, Gguf(), tmp_path / "small.gguf")
    ours, theirs = fewbits.load(small), fewbits.load(tmp_path / "small.gguf")
    table = theirs.model.embed_tokens
    assert isinstance(table, CompressedEmbedding) and type(theirs.lm_head) is (TiedHead if tied else CompressedLinear)
    assert torch.equal(table.stored.weight.decode(), ours.model.embed_tokens.stored.weight.decode())
    assert torch.equal(theirs.lm_head.weight, ours.lm_head.weight)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-5)
    types = {name: blocks.type_number for name, blocks in GgufFile(tmp_path / "small.gguf").tensors()}
    assert types["token_embd.weight"] == 8 and types.get("output.weight") == (None if tied else 2)  # Q8_0 and Q4_0


def test_a_dense_table_that_a_file_is_to_hold_in_blocks_is_a_compressed_layer_of_that_file(folder, tmp_path):
    small = folder(Plan(FOUR), False)
    export(small, Gguf(embedding="q8_0"), tmp_path / "small.gguf")
    model = fewbits.load(tmp_path / "small.gguf")
    assert isinstance(model.model.embed_tokens, CompressedEmbedding) and isinstance(
        model.model.embed_tokens.stored.weight.terms[0], Uniform
    )
    dense = open_model(tmp_path / "small.gguf").load()
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-4)


def test_a_table_that_no_block_type_holds_is_named(folder, tmp_path):
    small = folder(Plan(FOUR, embeddings=Rtn(bits=3, group_size=16)), True)
    with pytest.raises(InputError, match=r"gguf cannot hold model\.embed_tokens: .*dense"):
        export(small, Gguf(), tmp_path / "small.gguf")
    record = export(small, Gguf(), tmp_path / "small.gguf", requantize=True).record()
    assert set(record["requantized"]) == {"model.embed_tokens"} and 0 < record["requantized"]["model.embed_tokens"] < 1e-3
