"""What tests of several folders are run on."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.models.source import open_model


@pytest.fixture(scope="session")
def first_blocks(tmp_path_factory):
    """A folder with the first two of the built-in model's eight blocks, its norm, its head and its tokenizer.

    Its weights and its inputs are those of a trained model; what a method loses shows as KL to the same two blocks.
    """
    path, source = tmp_path_factory.mktemp("first") / "blocks", open_model("builtin:tiny-lm")
    whole = source.load()
    model = LlamaForCausalLM(LlamaConfig(**(whole.config.to_dict() | {"num_hidden_layers": 2})))
    model.load_state_dict(whole.state_dict(), strict=False)
    model.save_pretrained(path)
    source.tokenizer().save_pretrained(path)
    return path
