"""A small random language model and its stack, for tests of ranking, loading and resizing."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.export.checkpoint import write_checkpoint
from fewbits.methods.weights.bitstack import Bitstack
from fewbits.models.source import open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import StreamOptions, compress_model

WINDOWS = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(0))
METHOD = Bitstack(blocks=3, order_windows=5)


def save_llama(path, scale=3.0, **more):
    """Weights larger than usual, so that what is said of the next token depends on them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale * 3)
    model.save_pretrained(path)
    return path


def stacked(model, work, method=METHOD, plan=None, options=None, mask=None):
    return compress_model(open_model(model), plan or Plan(method), WINDOWS, work, options or StreamOptions(), mask)


def write(model, summary, output):
    write_checkpoint(output, open_model(model), summary.layers, lambda folder: ({}, ""), replaced=summary.replaced(), order=summary.order)
    return output
