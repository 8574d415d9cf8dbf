"""What tests of several folders are run on."""

import pytest
import torch
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


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """A folder with a small model that knows 24 x 32 drawn tokens by heart: its logits are far from even."""
    windows = torch.randint(64, (24, 32), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path_factory.mktemp("learned") / "llama"
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=windows, labels=windows).loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    return path
